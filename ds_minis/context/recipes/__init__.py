"""What `scripts/create_config.py` reads: a recipe for an extension, checked, and whether its stages fit."""
