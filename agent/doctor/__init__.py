"""Everything that keeps a station from its work, found before the first part does."""
