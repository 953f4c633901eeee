"""The inspect process: from a trigger to a verdict at its deadline."""
