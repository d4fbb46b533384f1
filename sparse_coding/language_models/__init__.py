"""Small GPTs to study: trained from a nanoGPT-style config, measured against counting, kept in Hugging Face folders.

`config_file` reads the config and `corpus` the tokens; `gpt` is the model, `vocabulary_loss` its loss, `trainer` one
update of it, alone or among `processes`; `loop` is the training, `training_state` what lets it go on after a stop, and
`train` goes from text to folder. `ngrams` are the baselines that a model must beat, `card` writes its README.
`prepare_text` makes nanoGPT's data folders, `exchange` its checkpoints. `assets/` holds the bundled models.
"""
