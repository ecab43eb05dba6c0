"""Layer inputs between forward and backward."""
