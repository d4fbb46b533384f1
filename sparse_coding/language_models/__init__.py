"""Small GPTs to study: trained from a nanoGPT-style config, measured against counting, kept in Hugging Face folders.

`config_file` reads the config, `tokenizers` makes or loads a tokenizer, `gpt` is the model and one update of it, `loop`
the training, `training_state` what lets it go on after a stop, `train` goes from text to folder. `ngrams` are the
baselines that a model must beat, `card` writes its README. `assets/` holds the bundled model.
"""
