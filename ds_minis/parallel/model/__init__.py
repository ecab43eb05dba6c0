"""A converted model on a part of each sequence: its decoder, layers and loss, and the state that they share."""
