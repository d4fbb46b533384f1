"""Fast training steps. The loss in a dictionary's own file, through autograd, is the definition each one must equal."""
