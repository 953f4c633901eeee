"""What runs a recipe's graph on this device: the port in `engine`, its runtimes, and the parity gate."""
