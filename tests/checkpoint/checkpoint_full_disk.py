"""Run by test_checkpoint_store: no file may grow past a limit while the second checkpoint is written, then it may."""

import asyncio
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

import xxhash

from rlorch.checkpoint import FileCheckpointStore
from rlorch.errors import StorageError

SMALL, LARGE = b"a" * 1000, b"b" * 300_000


async def write_small(path: Path) -> Mapping[str, str]:
    (path / "weights").write_bytes(SMALL)
    return {"weights": xxhash.xxh3_128_hexdigest(SMALL)}


async def write_large(path: Path) -> Mapping[str, str]:
    (path / "weights").write_bytes(LARGE)
    return {"weights": xxhash.xxh3_128_hexdigest(LARGE)}


def names_in(path: Path) -> list[str]:
    return [entry.name for entry in path.iterdir()]


async def main(path: Path) -> None:
    store = FileCheckpointStore(path, keep_last=1)
    await store.save("step-1", write_small, step=1, extra={})
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    refusal = ""
    try:
        await store.save("step-2", write_large, step=2, extra={})
    except StorageError as error:
        refusal = str(error)
    assert "the disk is full after 100000 bytes" in refusal, refusal
    assert "step-1 is intact" in refusal, refusal
    assert names_in(path) == ["step-1"]
    assert (await store.open("step-1") / "weights").read_bytes() == SMALL
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    await store.save("step-2", write_large, step=2, extra={})
    assert names_in(path) == ["step-2"]
    print(refusal)


asyncio.run(main(Path(sys.argv[1])))
