"""One page after a shift: what the station decided, where it could not, which parts to see."""
