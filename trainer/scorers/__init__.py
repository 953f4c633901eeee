"""How far an image is from its reconstruction: -> anomaly map and score."""
