"""What each device holds beside the step: weights, gradients, optimizer states, and what its engine and its group add."""
