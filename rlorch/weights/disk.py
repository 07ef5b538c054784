"""The few operating-system calls that a durable store makes, as a port that tests can interrupt at any call.

A file appears under its name whole or not at all: bytes go to a temporary name and are synced, then `link` gives them
their name, atomically, and only if that name is free. POSIX and NFS (v3 on) promise this for link(2), which is why no
lock is needed. Directories are synced so that names survive a power cut.
"""

import os
from pathlib import Path
from typing import Protocol


class Disk(Protocol):
    """File operations; errors are OSError."""

    def write(self, path: Path, data: bytes) -> None:
        """Create a new file and sync its content to the device."""
        ...

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name, atomically. Raises FileExistsError when the name is taken."""
        ...

    def unlink(self, path: Path) -> None:
        """Remove a name; a name that is not there is fine."""
        ...

    def sync_directory(self, path: Path) -> None:
        """Make the names in a directory durable."""
        ...

    def read(self, path: Path) -> bytes:
        """The content of a file."""
        ...

    def names(self, path: Path) -> list[str]:
        """The names in a directory, sorted; it is made if it is not there."""
        ...


class OsDisk:
    """The real one."""

    def write(self, path: Path, data: bytes) -> None:
        """See `Disk.write`."""
        with path.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def link(self, source: Path, target: Path) -> None:
        """See `Disk.link`."""
        os.link(source, target)

    def unlink(self, path: Path) -> None:
        """See `Disk.unlink`."""
        path.unlink(missing_ok=True)

    def sync_directory(self, path: Path) -> None:
        """See `Disk.sync_directory`."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def read(self, path: Path) -> bytes:
        """See `Disk.read`."""
        return path.read_bytes()

    def names(self, path: Path) -> list[str]:
        """See `Disk.names`."""
        path.mkdir(parents=True, exist_ok=True)
        return sorted(os.listdir(path))
