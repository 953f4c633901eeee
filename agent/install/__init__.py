"""A station as a service of systemd, and back again."""
