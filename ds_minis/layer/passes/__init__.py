"""Runs a decoder layer over chunks, up to its attention and after it, as one autograd node."""
