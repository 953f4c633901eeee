"""What a good part would look like here: image -> reconstruction."""
