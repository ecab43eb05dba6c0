"""Runs whole decoder layers over chunks, all but their attention, each as one autograd node."""
