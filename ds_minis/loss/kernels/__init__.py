"""What is computed of one chunk of logits."""
