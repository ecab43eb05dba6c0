"""Who shares a sequence, how it is cut, and what they exchange."""
