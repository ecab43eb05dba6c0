"""Whole decoder layers: can one be tiled, and which of its values does nobody read?"""
