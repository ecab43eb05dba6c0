"""Computes LM head and loss over chunks, so that the logits never exist as a whole."""
