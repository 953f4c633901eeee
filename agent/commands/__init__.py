"""Remote commands: read, checked, applied between two parts, audited and answered."""
