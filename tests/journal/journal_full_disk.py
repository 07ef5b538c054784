"""Run by test_journal_crash: the journal's file may not grow past a limit, and later it may."""

import asyncio
import resource
import sys
from pathlib import Path

from journal_builders import make_batch, make_group, same

from rlorch.errors import StorageError
from rlorch.journal import SqliteJournal, read_state

LIMIT_BYTES = 400_000


async def main(path: Path) -> None:
    async with SqliteJournal(path) as journal:
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, resource.RLIM_INFINITY))
        written, refusal = 0, ""
        while not refusal:
            try:
                await journal.group_done(make_group(written))
                written += 1
            except StorageError as error:
                refusal = str(error)
        assert "disk is full" in refusal, refusal
        assert str(path) in refusal, refusal
        assert written > 0
        assert len(read_state(path).finished) == written  # acknowledged, so there
        try:
            await journal.batch_formed(make_batch(0, *range(written)))
        except StorageError:
            pass
        else:
            raise AssertionError("the disk was full")
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        await journal.group_done(make_group(written))
        await journal.batch_formed(make_batch(0, *range(written + 1)))
    (batch,) = read_state(path).batches
    assert all(same(group, make_group(group.id)) for group in batch.groups)
    assert batch.group_ids == tuple(range(written + 1))
    print("written", written)


asyncio.run(main(Path(sys.argv[1])))
