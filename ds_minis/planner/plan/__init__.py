"""The answer: memory at any length, the longest that fits, and the ways to train side by side."""
