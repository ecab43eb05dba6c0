"""Logits that are computed only as far as they are needed."""
