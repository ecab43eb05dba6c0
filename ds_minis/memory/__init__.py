"""What layers keep between forward and backward: their inputs, on the device or the host, and more within a budget."""
