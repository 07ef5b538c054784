"""The durable record of a run in SQLite, and what a resumed run reads back from it.

    group_done, group_dropped, batch_formed, event -> [one thread, many writes per sync] -> journal.sqlite
    journal.sqlite -> read_state -> RecoveredRun: what to train again, what is ready to train, what not to draw again

Recovery is the newest checkpoint (version v) plus the batches of steps >= v, trained again.
"""

from rlorch.journal.journal import SqliteJournal
from rlorch.journal.recovery import (
    Event,
    RecoveredRun,
    iter_batches,
    iter_dropped,
    iter_events,
    iter_groups,
    read_state,
)

__all__ = [
    "Event",
    "RecoveredRun",
    "SqliteJournal",
    "iter_batches",
    "iter_dropped",
    "iter_events",
    "iter_groups",
    "read_state",
]
