"""The file work of the checkpoint store: hash, sync, replace and remove directories; synchronous.

Each function says what a crash in the middle leaves behind; `sweep` cleans it up. Directories at work have names with
a leading dot, which no checkpoint has, and are held by a lock that the kernel drops when their process dies.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from rlorch.errors import StorageError
from rlorch.types import FileEntry

_PARTIAL, _REPLACED, _DELETED = ".partial-", ".replaced-", ".deleted-"
_CHUNK_BYTES = 1 << 22


def hash_tree(directory: Path, *, leave_out: str = "") -> dict[str, FileEntry]:
    """Every regular file below a directory, by relative POSIX path.

    Raises:
        StorageError: a link or a special file, which would not move with the checkpoint.
    """
    entries: dict[str, FileEntry] = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise StorageError(f"{path} is a link or a special file; a checkpoint holds plain files only")
        if path.is_file() and name != leave_out:
            entries[name] = _hash_file(path)
    return entries


def _hash_file(path: Path) -> FileEntry:
    hasher = xxhash.xxh3_128()
    size_bytes = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            hasher.update(chunk)
            size_bytes += len(chunk)
    return FileEntry(hasher.hexdigest(), size_bytes)


def tree_bytes(directory: Path) -> int:
    """Bytes in the files below a directory, as far as they can be seen."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def sync_tree(directory: Path) -> None:
    """Flush every file and directory below, and the directory itself, to disk."""
    for path in directory.rglob("*"):
        sync(path)
    sync(directory)


def sync(path: Path) -> None:
    """Flush a file's bytes, or a directory's entries, to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def partial_directory(parent: Path, name: str) -> Generator[Path]:
    """An empty directory to fill, removed at the end unless it was moved away. A crash leaves it to `sweep`."""
    path = Path(tempfile.mkdtemp(prefix=f"{_PARTIAL}{name}-", dir=parent))
    path.chmod(0o755)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)  # what resists now, sweep takes later
        os.close(fd)


def publish(partial: Path, final: Path) -> None:
    """Move a synced directory to its name, replacing what is there.

    A crash leaves the old or the new one under the name; between the two renames it leaves none, and the old one under
    a dotted name, which `sweep` moves back.
    """
    replaced = final.with_name(_REPLACED + final.name)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    partial.rename(final)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove(path: Path) -> None:
    """Delete a directory: gone from its name at once, from the disk a little later. Absent is fine."""
    trash = Path(tempfile.mkdtemp(prefix=_DELETED, dir=path.parent))
    try:
        path.rename(trash / path.name)
    except FileNotFoundError:
        pass
    finally:
        shutil.rmtree(trash)
    sync(path.parent)


def sweep(parent: Path) -> None:
    """Finish or undo what a crash interrupted. Directories that a live process works in are left alone."""
    for path in parent.glob(f"{_REPLACED}*"):
        final = path.with_name(path.name.removeprefix(_REPLACED))
        if final.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(final)
    for path in parent.glob(f"{_DELETED}*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in parent.glob(f"{_PARTIAL}*"):
        _remove_if_orphaned(path)


def _remove_if_orphaned(path: Path) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:  # another sweep was here first
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    except BlockingIOError:
        return  # its process lives
    finally:
        os.close(fd)
