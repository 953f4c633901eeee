"""A line that does not exist: parts on a belt, drawn with their pose and defects known."""
