"""From text to tokens, through a language model, to activations."""
