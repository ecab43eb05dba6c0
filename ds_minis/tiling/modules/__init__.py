"""Tiles token-wise modules by swapping their classes, and detects what must not run inside a chunk loop."""
