"""Small GPTs to study: trained from a nanoGPT-style config, measured against counting, kept in Hugging Face folders.

`config_file` reads the config, `tokenizers` makes or loads a tokenizer, `train` is the loop, `ngrams` are the baselines
that a model must beat, `card` writes its README. `assets/` holds the bundled model.
"""
