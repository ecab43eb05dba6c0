"""A step of a few layers on tensors without values: followed, written down, and carried on to full depth."""
