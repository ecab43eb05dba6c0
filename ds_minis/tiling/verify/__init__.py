"""Analyzes a module's behavior: whether it is token-wise, and for which calls the analysis holds."""
