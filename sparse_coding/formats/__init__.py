"""Dictionaries on disk: one file per format."""
