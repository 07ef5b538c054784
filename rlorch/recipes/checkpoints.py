"""A run's resumable checkpoints, one per version."""

import logging
from pathlib import Path

from rlorch.checkpoint.store import FileCheckpointStore
from rlorch.errors import StorageError
from rlorch.ports import Trainer
from rlorch.recipes.sections import CheckpointSpec
from rlorch.types import Checkpoint

log = logging.getLogger(__name__)


class Checkpoints:
    """Saves `step-<version>` and finds the newest intact one."""

    def __init__(self, directory: Path, spec: CheckpointSpec) -> None:
        self._store = FileCheckpointStore(directory, keep_last=spec.keep_last)
        self._every = spec.every
        self._saved: int | None = None

    def due(self, version: int) -> bool:
        """Whether `version` is one of every N."""
        return self._every > 0 and version % self._every == 0

    async def latest(self) -> Checkpoint | None:
        """The newest intact checkpoint. Raises `StorageError` when there are some and all are damaged."""
        return await self._store.latest()

    async def save(self, trainer: Trainer, version: int) -> bool:
        """Save `version`, unless it is the one saved last; whether it is safe now. One of an earlier process is
        replaced, since it may be the damaged one that a resume passed over.

        A full disk costs a checkpoint, not the run: training goes on, and the one before stays.
        """
        if version == self._saved:
            return True
        try:
            await self._store.save(f"step-{version}", lambda path: trainer.save(str(path)), step=version, extra={})
        except StorageError as error:
            log.error("no checkpoint at version %d, the one before stays: %s", version, error)
            return False
        self._saved = version
        return True
