"""Checkpoints: a hashed manifest and an atomic directory store with time-to-live."""
