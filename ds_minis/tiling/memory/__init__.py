"""Stores layer inputs between forward and backward."""
