"""Training a sweep: grid -> members -> stacks, one stream for all of them, checkpoints and exact resume."""
