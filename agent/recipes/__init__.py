"""The recipes of one station: whose they are, which are there, which one judges."""
