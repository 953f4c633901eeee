"""The publish process: what the line decided goes to the disk, to the broker, to the archive and to people."""
