"""How a station does: latencies, counts, drift, and the pictures of them."""
