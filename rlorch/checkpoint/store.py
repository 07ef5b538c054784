"""Checkpoints as directories: whole under their name, or not there at all.

    sweep -> empty partial directory -> writer fills it -> hash, compare -> manifest -> fsync -> rename -> retention

Invariants: a name that can be listed has every byte its manifest promises, as of the moment it was written; a failed
save leaves the older checkpoints untouched; retention runs only after the new one is on disk. Hashing and syncing run
on threads, so that sampling goes on meanwhile.
"""

import asyncio
import errno
import logging
import shutil
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from rlorch.aio import deadline
from rlorch.checkpoint.files import hash_tree, partial_directory, publish, remove, sweep, sync_tree, tree_bytes
from rlorch.checkpoint.manifest import (
    MANIFEST_NAME,
    broken_promises,
    check_name,
    damage,
    from_json,
    oldest_first,
    to_delete,
    to_json,
)
from rlorch.errors import RlorchError, StorageError
from rlorch.types import Checkpoint, CheckpointManifest

Writer = Callable[[Path], Awaitable[Mapping[str, str]]]

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger(__name__)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors and torch raise errors of their own that only quote the system's.
_FULL_TEXTS = ("No space left on device", "Disk quota exceeded", "File too large")


def _utc_seconds() -> float:
    return datetime.now(UTC).timestamp()


class FileCheckpointStore:
    """The CheckpointStore port on a directory, which the trainer's machine must see under the same path.

    Args:
        directory: holds one directory per checkpoint; made when the first is saved.
        config_digest: stamped into each manifest.
        keep_last: newest checkpoints that stay after a save (see `rlorch.checkpoint.manifest`); None keeps all.
        keep_every: checkpoints whose step is a multiple of it stay for good.
        io_timeout_s: bound on hashing and syncing one checkpoint, seconds (the writer has its own bounds).
        now_s: Unix time, for stamps and times to live.
    """

    def __init__(
        self,
        directory: Path,
        *,
        config_digest: str = "",
        keep_last: int | None = 3,
        keep_every: int | None = None,
        io_timeout_s: float = 1800.0,
        now_s: Callable[[], float] = _utc_seconds,
    ) -> None:
        for what, value in (("keep_last", keep_last), ("keep_every", keep_every)):
            if value is not None and value < 1:
                raise ValueError(f"{what} must be 1 or more, or None, not {value}")
        self._directory = directory
        self._config_digest = config_digest
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._io_timeout_s = io_timeout_s
        self._now_s = now_s
        self._saving = asyncio.Lock()

    async def save(
        self,
        name: str,
        writer: Writer,
        *,
        step: int,
        extra: Mapping[str, Any],
        ttl_seconds: float | None = None,
        pinned: bool = False,
        resumable: bool = True,
    ) -> CheckpointManifest:
        """Write a checkpoint; saves run one at a time.

        Args:
            name: letters, digits, '.', '_', '-'; an existing one is replaced.
            writer: fills the empty directory it is given and returns the xxh3-128 hex digest by file name.
            step: the trainer's version.
            extra: JSON to keep with it.
            ttl_seconds: delete it after so long; None leaves it to the retention policy.
            pinned: never delete it to make room.
            resumable: whether a run can go on from it.

        Raises:
            UserError: a bad name, or `extra` is not JSON.
            StorageError: the disk is full, or the files are not what the writer says. Older checkpoints are intact.
        """
        check_name(name)
        draft = CheckpointManifest(
            name, step, self._now_s(), {}, self._config_digest, dict(extra), ttl_seconds, pinned, resumable
        )
        to_json(draft)  # an `extra` that is not JSON is refused before anything is written
        async with self._saving:
            previous = await self.list()
            await self._on_thread(self._prepare)
            with partial_directory(self._directory, name) as partial:
                try:
                    promised = await writer(partial)
                    manifest = await self._on_thread(self._publish, partial, draft, promised)
                except Exception as error:
                    if not _is_full(error):
                        raise
                    raise self._full(name, partial, previous) from error
            await self._on_thread(self._retain)
        return manifest

    async def latest(self) -> Checkpoint | None:
        """The newest intact resumable checkpoint; None when there never was one.

        Raises:
            StorageError: there are checkpoints, and all are damaged.
        """
        return await self._on_thread(self._latest)

    async def list(self) -> tuple[CheckpointManifest, ...]:
        """All checkpoints with a readable manifest, oldest first."""
        manifests, _ = await self._on_thread(self._scan)
        return manifests

    async def open(self, name: str) -> Path:
        """The directory of a checkpoint, every file of which has just been verified.

        Raises:
            UserError: a bad name.
            StorageError: absent or damaged; the message names the file.
        """
        check_name(name)
        return Path((await self._on_thread(self._open, name)).path)

    async def delete(self, name: str) -> None:
        """Delete a checkpoint, pinned or not. Idempotent.

        Raises:
            UserError: a bad name.
            StorageError: the files cannot be removed.
        """
        path = self._directory / check_name(name)
        if path.exists():
            await self._on_thread(remove, path)

    async def prune(self) -> tuple[str, ...]:
        """Apply the retention policy now (times to live pass without a save too); the names that went."""
        return await self._on_thread(self._retain)

    # --- on a thread --------------------------------------------------------------------------------------

    async def _on_thread(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        what = f"checkpoints in {self._directory}: {getattr(call, '__name__', 'work')} hangs; is the disk reachable?"
        try:
            async with deadline(self._io_timeout_s, what):
                return await asyncio.to_thread(call, *args, **kwargs)
        except OSError as error:
            if _is_full(error) or isinstance(error, RlorchError):
                raise
            raise StorageError(f"checkpoints in {self._directory}: {error}; check the path and its rights") from error

    def _prepare(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        sweep(self._directory)

    def _publish(self, partial: Path, draft: CheckpointManifest, promised: Mapping[str, str]) -> CheckpointManifest:
        if (partial / MANIFEST_NAME).exists():
            raise StorageError(f"checkpoint {draft.name}: the writer made a {MANIFEST_NAME}, which is the store's own")
        found = hash_tree(partial)
        if problems := broken_promises(promised, found):
            raise StorageError(
                f"checkpoint {draft.name} in {self._directory} was not written whole: {'; '.join(problems)}; "
                f"nothing was replaced, save again"
            )
        manifest = replace(draft, files=found)
        (partial / MANIFEST_NAME).write_bytes(to_json(manifest))
        sync_tree(partial)
        publish(partial, self._directory / draft.name)
        return manifest

    def _retain(self) -> tuple[str, ...]:
        manifests, _ = self._scan()
        reasons = to_delete(manifests, keep_last=self._keep_last, keep_every=self._keep_every, now_s=self._now_s())
        for name, reason in reasons.items():
            try:
                remove(self._directory / name)
                _log.info("checkpoint %s deleted: %s", name, reason)
            except OSError as error:  # the new checkpoint is safe, which is what the caller asked for
                _log.warning("checkpoint %s could not be deleted (%s): %s", name, reason, error)
        return tuple(reasons)

    def _scan(self) -> tuple[tuple[CheckpointManifest, ...], dict[str, str]]:
        """Readable manifests, oldest first, and what is wrong with the others by name."""
        manifests: tuple[CheckpointManifest, ...] = ()
        problems: dict[str, str] = {}
        if not self._directory.is_dir():
            return manifests, problems
        for path in sorted(self._directory.iterdir()):
            if path.name.startswith(".") or not path.is_dir():
                continue
            try:
                manifests += (self._manifest(path.name),)
            except StorageError as error:
                problems[path.name] = str(error)
        return tuple(oldest_first(manifests)), problems

    def _manifest(self, name: str) -> CheckpointManifest:
        path = self._directory / name
        try:
            # The directory's name counts: a person may have copied the checkpoint to another.
            return replace(from_json((path / MANIFEST_NAME).read_bytes()), name=name)
        except FileNotFoundError as error:
            known = ", ".join(sorted(entry.name for entry in self._directory.glob("[!.]*"))) or "none"
            raise StorageError(f"checkpoint {name} is not in {self._directory} (there are: {known})") from error
        except (OSError, StorageError) as error:
            raise StorageError(f"checkpoint {path} is damaged: {error}") from error

    def _open(self, name: str) -> Checkpoint:
        manifest = self._manifest(name)
        path = self._directory / name
        try:
            problems = damage(manifest, hash_tree(path, leave_out=MANIFEST_NAME))
        except OSError as error:
            problems = [str(error)]
        if problems:
            raise StorageError(f"checkpoint {path} is damaged: {'; '.join(problems)}; resume from another one")
        return Checkpoint(manifest, str(path))

    def _latest(self) -> Checkpoint | None:
        manifests, problems = self._scan()
        skipped = list(problems.values())
        for manifest in reversed(manifests):
            if not manifest.resumable:
                continue
            try:
                opened = self._open(manifest.name)
            except StorageError as error:
                skipped.append(str(error))
                continue
            for problem in skipped:
                _log.warning("resuming from %s instead: %s", manifest.name, problem)
            return replace(opened, skipped=tuple(skipped))
        if skipped:
            raise StorageError(f"no checkpoint in {self._directory} is intact: {'; '.join(skipped)}")
        return None

    def _full(self, name: str, partial: Path, previous: tuple[CheckpointManifest, ...]) -> StorageError:
        written = tree_bytes(partial)
        needed = max([written, *(manifest.size_bytes for manifest in previous[-1:])])
        free = shutil.disk_usage(self._directory).free + written
        intact = f"checkpoint {previous[-1].name} is intact" if previous else "no checkpoint was there before"
        return StorageError(
            f"checkpoint {name} in {self._directory}: the disk is full after {written} bytes; it needs about {needed} "
            f"bytes and {free} are free: make room or lower keep_last, then save again; {intact}"
        )


def _is_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    return any(text in str(error) for text in _FULL_TEXTS)
