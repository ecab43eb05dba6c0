"""Runs functions and token-wise modules over chunks of tokens, exactly. Needs torch alone, as do memory, layer and loss."""
