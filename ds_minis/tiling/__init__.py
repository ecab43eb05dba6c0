"""Training over chunks of tokens, exactly. Needs torch and nothing else."""
