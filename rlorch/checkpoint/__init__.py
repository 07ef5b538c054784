"""Checkpoints: a hashed manifest and an atomic directory store with time-to-live."""

from rlorch.checkpoint.store import FileCheckpointStore

__all__ = ["FileCheckpointStore"]
