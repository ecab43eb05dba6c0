"""One autograd node over chunks of rows: the operation, its gradients, and a module's tensors."""
