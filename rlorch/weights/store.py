"""Published versions in a directory that trainer, samplers and coordinator share, and the same in memory.

    root/payloads/<key>          payload bytes, each under a new name, never changed
    root/log/<number>.json       one manifest per head move (or null: a rewind to nothing), numbered from 0

The head is the newest entry of the log, so moving it is one atomic step: linking entry number n + 1. Two processes
that both saw entry n race for the same name and exactly one gets it, with no lock that a killed process could leave
behind. Bytes are on the device before an entry names them; a crash at any point leaves the old head or the new one,
plus at most files that nobody names, which a later `gc` removes.

Log entries never change, so each process parses an entry once.
"""

import asyncio
import errno
import re
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from rlorch.errors import StaleHeadError, StorageError
from rlorch.specs import WeightsSpec
from rlorch.types import Manifest
from rlorch.weights import chain as chains
from rlorch.weights.disk import Disk, OsDisk
from rlorch.weights.manifest import key_version, manifest_from_json, manifest_to_json

_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_ENTRY = re.compile(r"(\d{12})\.json")
_TEMPORARY = ".tmp-"
_NOTHING = b"null"


def check_key(key: str) -> str:
    """`key`, if it is a plain file name: letters, digits, `._-`, not starting with a dot or dash, at most 200.

    Raises:
        StorageError: it is anything else, such as a path out of the store.
    """
    if not _KEY.fullmatch(key):
        raise StorageError(f"{key[:200]!r} is not a payload key: use letters, digits, '.', '_' and '-'")
    return key


class FileWeightStore:
    """The `WeightStore` port over a directory. Safe between threads, processes and machines that share it.

    Files need a file system with hard links (any local one, NFS, Lustre). Work runs on threads, one call each.
    """

    def __init__(self, root: Path | str, spec: WeightsSpec, disk: Disk | None = None) -> None:
        self._root = Path(root)
        self._payloads = self._root / "payloads"
        self._log = self._root / "log"
        self._spec = spec
        self._disk: Disk = disk or OsDisk()
        self._parsed: dict[int, Manifest | None] = {}

    # --- the port

    async def put(self, key: str, payload: bytes) -> None:
        """See `WeightStore.put`. Raises `StorageError` when other bytes have that key, or the disk is full."""
        await asyncio.to_thread(self._put, check_key(key), payload)

    async def get(self, key: str) -> bytes:
        """See `WeightStore.get`."""
        path = self._payloads / check_key(key)
        return await asyncio.to_thread(self._read, path)

    async def head(self) -> Manifest | None:
        """See `WeightStore.head`."""
        live = await asyncio.to_thread(self._live)
        return live[-1] if live else None

    async def advance(self, expected: int | None, new: Manifest) -> None:
        """See `WeightStore.advance`. Then deletes what the new head made superfluous (`gc`)."""
        await asyncio.to_thread(self._advance, expected, new)
        await self.gc()

    async def chain(self, version: int) -> tuple[Manifest, ...]:
        """See `WeightStore.chain`."""
        return chains.chain_to(await asyncio.to_thread(self._live), version)

    # --- beyond the port

    async def rewind(self, version: int) -> None:
        """Forget every version after `version`, for a run that resumes from an older checkpoint. Idempotent.

        Call it before any other role of the run starts. The head is then the newest version left, or None.
        """
        await asyncio.to_thread(self._rewind, version)

    async def gc(self) -> list[str]:
        """Delete chains older than the newest `spec.keep_anchors`, rewound versions and remains of crashed writers.

        Payloads of versions after the head are left alone (they are about to be published), and so is every key that
        `payload_key` did not make. A writer of a version that is not after the head gets a `StorageError` when its
        unfinished file is taken for remains. Returns the names of the deleted files.
        """
        return await asyncio.to_thread(self._gc)

    async def retain(self, versions: Collection[int]) -> list[str]:
        """Delete every version that neither `versions` nor the head needs, for owners that keep versions by name and
        not by age. Payloads of versions after the head are left alone, as by `gc`. Returns the deleted files' names."""
        return await asyncio.to_thread(self._retain, frozenset(versions))

    # --- on a thread

    def _put(self, key: str, payload: bytes) -> None:
        if not self._publish(self._payloads, key, payload) and self._read(self._payloads / key) != payload:
            raise StorageError(
                f"{self._payloads / key} holds other bytes than the {len(payload)} to put: a key is never reused; "
                "delete the file if it is damaged"
            )

    def _advance(self, expected: int | None, new: Manifest) -> None:
        path = self._payloads / check_key(new.payload)
        # Looked up before the head is: where a rival moved it and collected these bytes, the error is the stale head.
        stored = path.stat().st_size if path.is_file() else None
        entries = self._entries()
        if chains.moves_head(chains.live_versions(entries.values()), expected, new):
            if stored != new.payload_bytes:
                raise StorageError(
                    f"{path} has {stored} bytes, its manifest says {new.payload_bytes}: put the payload before moving "
                    "the head to it"
                )
            self._append(max(entries, default=-1) + 1, manifest_to_json(new), new.version)
        with _storage_errors("sync", self._log):
            self._disk.sync_directory(self._log)

    def _rewind(self, version: int) -> None:
        entries = self._entries()
        live = chains.live_versions(entries.values())
        if not live or live[-1].version <= version:
            return
        kept = [manifest for manifest in live if manifest.version <= version]
        content = manifest_to_json(kept[-1]) if kept else _NOTHING
        self._append(max(entries) + 1, content, version)
        with _storage_errors("sync", self._log):
            self._disk.sync_directory(self._log)

    def _append(self, number: int, content: bytes, version: int) -> None:
        """Write log entry `number`; `StaleHeadError` when somebody else was first."""
        name = f"{number:012d}.json"
        if not self._publish(self._log, name, content) and self._read(self._log / name) != content:
            raise StaleHeadError(
                f"another process moved the head in {self._root} while version {version} was being published "
                f"(entry {name}): only one trainer may publish to a store"
            )

    def _gc(self) -> list[str]:
        entries = self._entries()
        live = chains.live_versions(entries.values())
        return self._delete(entries, live, chains.garbage(live, self._spec.keep_anchors))

    def _retain(self, versions: frozenset[int]) -> list[str]:
        entries = self._entries()
        live = chains.live_versions(entries.values())
        return self._delete(entries, live, chains.unneeded(live, versions))

    def _delete(
        self, entries: Mapping[int, Manifest | None], live: Sequence[Manifest], garbage: Sequence[Manifest]
    ) -> list[str]:
        """Delete the versions in `garbage`, rewound ones, and the remains of crashed writers."""
        if not live:
            return []
        dead = {manifest.version for manifest in garbage}
        kept = {id(manifest) for manifest in live if manifest.version not in dead}
        newest = max(entries)
        # Oldest entries first: a crash in between can then not bring back what a later entry took back.
        doomed = [number for number, entry in entries.items() if id(entry) not in kept and number != newest]
        payloads = {manifest.payload for manifest in live if manifest.version not in dead}
        files = [self._log / f"{number:012d}.json" for number in doomed]
        with _storage_errors("list", self._root):
            files += [self._payloads / name for name in self._disk.names(self._payloads)
                      if name not in payloads and _is_past(name, live[-1].version)]  # fmt: skip
            files += [self._log / name for name in self._disk.names(self._log)
                      if name.startswith(_TEMPORARY) and _entry_number(name) <= newest]  # fmt: skip
        for file in files:
            with _storage_errors("delete", file):
                self._disk.unlink(file)
        return [file.name for file in files]

    def _live(self) -> list[Manifest]:
        return chains.live_versions(self._entries().values())

    def _entries(self) -> dict[int, Manifest | None]:
        """The log by entry number, in order."""
        with _storage_errors("list", self._log):
            numbers = [int(match[1]) for name in self._disk.names(self._log) if (match := _ENTRY.fullmatch(name))]
        entries: dict[int, Manifest | None] = {}
        for number in numbers:
            if number not in self._parsed:
                path = self._log / f"{number:012d}.json"
                try:
                    content = self._disk.read(path)
                except FileNotFoundError:
                    continue  # collected since it was listed, so nobody needs it
                except OSError as error:
                    raise _storage_error("read", path, error) from error
                self._parsed[number] = None if content == _NOTHING else manifest_from_json(content, str(path))
            entries[number] = self._parsed[number]
        self._parsed = dict(entries)
        return entries

    def _read(self, path: Path) -> bytes:
        with _storage_errors("read", path):
            return self._disk.read(path)

    def _publish(self, directory: Path, name: str, content: bytes) -> bool:
        """Give `content` its name, whole and durable; False when the name was taken already."""
        temporary = directory / f"{_TEMPORARY}{name}-{uuid4().hex}"
        with _storage_errors("write", directory / name):
            taken = name in self._disk.names(directory)
            try:
                if not taken:
                    self._disk.write(temporary, content)
                    self._disk.link(temporary, directory / name)
            except FileExistsError:
                taken = True
            except FileNotFoundError:
                # A rival was first and collected what it took for the remains of a crashed writer.
                taken = name in self._disk.names(directory)
                if not taken:
                    raise
            finally:
                self._disk.unlink(temporary)
            self._disk.sync_directory(directory)
        return not taken


class MemoryWeightStore:
    """The `WeightStore` port in this process's memory, for simulations and tests; keeps everything."""

    def __init__(self) -> None:
        self.payloads: dict[str, bytes] = {}
        self.live: list[Manifest] = []

    async def put(self, key: str, payload: bytes) -> None:
        """See `WeightStore.put`."""
        if self.payloads.setdefault(check_key(key), payload) != payload:
            raise StorageError(f"key {key!r} holds other bytes: a key is never reused")

    async def get(self, key: str) -> bytes:
        """See `WeightStore.get`."""
        if key not in self.payloads:
            raise StorageError(f"no payload {key!r}: ask for the newest version")
        return self.payloads[key]

    async def head(self) -> Manifest | None:
        """See `WeightStore.head`."""
        return self.live[-1] if self.live else None

    async def advance(self, expected: int | None, new: Manifest) -> None:
        """See `WeightStore.advance`."""
        if not chains.moves_head(self.live, expected, new):
            return
        if new.payload not in self.payloads:
            raise StorageError(f"no payload {new.payload!r}: put it before moving the head to version {new.version}")
        self.live.append(new)

    async def chain(self, version: int) -> tuple[Manifest, ...]:
        """See `WeightStore.chain`."""
        return chains.chain_to(self.live, version)


def _is_past(name: str, head_version: int) -> bool:
    """Whether a payload file, or the temporary file of one, belongs to a version that is not after the head."""
    version = key_version(name.removeprefix(_TEMPORARY))
    return version is not None and version <= head_version


def _entry_number(name: str) -> int:
    match = _ENTRY.match(name.removeprefix(_TEMPORARY))
    return int(match[1]) if match else -1


@contextmanager
def _storage_errors(action: str, path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise _storage_error(action, path, error) from error


def _storage_error(action: str, path: Path, error: OSError) -> StorageError:
    advice = {
        errno.ENOSPC: "the disk is full: free space, lower weights.keep_anchors, or choose another run directory",
        errno.EDQUOT: "the quota is used up: free space, lower weights.keep_anchors, or choose another run directory",
        errno.ENOENT: "it is not there: it was collected or never published; ask for the newest version",
        errno.EACCES: "permission denied: make the directory writable for every role of the run",
        errno.EROFS: "the file system is read-only: choose another run directory",
        errno.EPERM: "not permitted: the run directory needs a file system with hard links",
        errno.EOPNOTSUPP: "not supported: the run directory needs a file system with hard links",
    }
    return StorageError(f"cannot {action} {path}: {advice.get(error.errno or 0, str(error))}")
