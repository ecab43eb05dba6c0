"""Runs token-wise modules over chunks of tokens, exactly. Needs torch and nothing else, as memory, layer and loss do."""
