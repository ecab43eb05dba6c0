"""Decoder layers that are tiled, by class swap."""
