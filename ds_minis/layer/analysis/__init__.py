"""Analyzes whether a decoder layer can be tiled, and which of its values are dead."""
