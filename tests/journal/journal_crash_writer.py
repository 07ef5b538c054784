"""Run by test_journal_crash: forks, on demand, a driver that writes a journal until it is killed.

Each line on stdin is a journal path; the answer on stdout is `pid N`, then one line per acknowledged write, then
`ended`. Forking from a warm process costs milliseconds where a new interpreter costs half a second.
"""

import asyncio
import os
import sys
from pathlib import Path

from journal_builders import make_group

from rlorch.journal import SqliteJournal, read_state
from rlorch.types import Batch, Group


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


class Driver:
    """Finishes groups eight at a time; every fifth is dropped; four make a batch."""

    def __init__(self, journal: SqliteJournal, next_id: int, next_step: int, ready: list[Group]) -> None:
        self.journal = journal
        self.next_id = next_id
        self.next_step = next_step
        self.ready = ready

    async def finish_groups(self) -> None:
        while True:
            group_id, self.next_id = self.next_id, self.next_id + 1
            group = make_group(group_id)
            if group_id % 5 == 4:
                await self.journal.group_dropped(group_id, "all rewards equal", group)
                say(f"dropped {group_id}")
                continue
            await self.journal.group_done(group)
            say(f"done {group_id}")
            self.ready.append(group)
            if len(self.ready) >= 4:
                batch = Batch(self.next_step, tuple(self.ready[:4]))
                del self.ready[:4]
                self.next_step += 1
                await self.journal.batch_formed(batch)
                say(f"batch {batch.step} {' '.join(map(str, batch.group_ids))}")


async def drive(path: Path) -> None:
    journal = SqliteJournal(path, config_digest="crash")
    state = read_state(path)
    next_step = 0 if state.last_step is None else state.last_step + 1
    # As after a real crash: what was in flight and never resolved is drawn again, what is resolved is not.
    driver = Driver(journal, max(state.resolved, default=-1) + 1, next_step, list(state.finished))
    async with asyncio.TaskGroup() as tasks:
        for _ in range(8):
            tasks.create_task(driver.finish_groups())


for line in sys.stdin:
    child = os.fork()
    if child == 0:
        say(f"pid {os.getpid()}")
        asyncio.run(drive(Path(line.strip())))
    os.waitpid(child, 0)
    say("ended")
