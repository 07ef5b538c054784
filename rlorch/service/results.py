"""Outcomes of operations by request id: waited for, kept a while after they were read, and bounded."""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass

from rlorch.service.types import Failure, Result

Outcome = Result | Failure


@dataclass(frozen=True, slots=True)
class Retention:
    """How long outcomes are kept, seconds: after they were first read, and when nobody reads them; and how many."""

    read_s: float = 300.0
    unread_s: float = 3600.0
    max_outcomes: int = 4096


@dataclass(slots=True)
class _Slot:
    done: "asyncio.Future[Outcome]"
    settled_s: float | None = None
    read_s: float | None = None


class Results:
    """Outcomes of all models. `now_s` arguments are seconds of one clock."""

    def __init__(self, retention: Retention) -> None:
        self._retention = retention
        self._slots: OrderedDict[str, _Slot] = OrderedDict()

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._slots

    def expect(self, request_id: str) -> None:
        """An outcome of that id will come."""
        self._slots[request_id] = _Slot(asyncio.get_running_loop().create_future())

    def settle(self, request_id: str, outcome: Outcome, now_s: float) -> None:
        """The outcome is there; a second one is ignored."""
        slot = self._slots[request_id]
        if not slot.done.done():
            slot.done.set_result(outcome)
            slot.settled_s = now_s
            self._slots.move_to_end(request_id)

    async def read(self, request_id: str, wait_s: float, now_s: float) -> Outcome | None:
        """The outcome, waiting at most `wait_s` for it; None when it has not come."""
        slot = self._slots[request_id]
        await asyncio.wait([slot.done], timeout=max(wait_s, 0.0))
        if not slot.done.done():
            return None
        if slot.read_s is None:
            slot.read_s = now_s + wait_s
        return slot.done.result()

    def sweep(self, now_s: float) -> None:
        """Forget outcomes whose time is over; where there are too many, those that were read go first, by age."""
        settled = [(key, slot) for key, slot in self._slots.items() if slot.settled_s is not None]
        going = {key for key, slot in settled if self._is_over(slot, now_s)}
        left = [(key, slot) for key, slot in settled if key not in going]
        surplus = len(left) - self._retention.max_outcomes
        if surplus > 0:
            by_worth = sorted(left, key=lambda item: item[1].read_s is None)  # stable: by age within each
            going |= {key for key, _ in by_worth[:surplus]}
        for key in going:
            del self._slots[key]

    def _is_over(self, slot: _Slot, now_s: float) -> bool:
        assert slot.settled_s is not None
        if slot.read_s is not None:
            return now_s - slot.read_s >= self._retention.read_s
        return now_s - slot.settled_s >= self._retention.unread_s
