"""Workstation side: learns from good parts, exports one graph per recipe, measures it."""
