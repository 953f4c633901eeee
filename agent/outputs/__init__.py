"""What acts on a verdict: the port in `output`, gates and how they reach the plant."""
