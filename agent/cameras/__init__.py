"""Where frames come from: the port in `camera`, and cameras that are folders, drawings or real."""
