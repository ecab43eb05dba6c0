"""Tiles whole decoder layers: analyzes whether one can be tiled, and finds its dead values."""
