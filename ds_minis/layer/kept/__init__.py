"""Layers with `keep: "all"`: everything that their backward reads is kept."""
