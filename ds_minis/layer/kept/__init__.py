"""Decoder layers that keep everything that their backward reads."""
