"""Runs around a model's forward: sees whether there are labels, and decides what becomes of the logits."""
