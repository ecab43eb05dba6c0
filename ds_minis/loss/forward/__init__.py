"""Runs around a model's forward: reads the labels, and decides what becomes of the logits."""
