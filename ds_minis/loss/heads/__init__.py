"""LM heads, run over chunks of hidden states."""
