"""LM head and loss over chunks: logits that are never held as a whole."""
