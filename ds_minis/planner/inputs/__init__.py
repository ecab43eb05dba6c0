"""What is to be planned: the training run, the models that ship, and the files that state both."""
