"""Detectors without a reconstructor: image -> (anomaly_map, score)."""
