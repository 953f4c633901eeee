"""The same verdicts in Sparkplug B, for plants that ask for it."""
