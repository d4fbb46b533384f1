"""Runs on rented GPUs: find an offer, rent it, run there, fetch what it made, destroy it, know what it cost."""
