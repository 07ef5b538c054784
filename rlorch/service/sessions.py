"""Client sessions: who uses models, and whether they are still there."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from rlorch.errors import UserError
from rlorch.service.records import Kind, Records


@dataclass(frozen=True, slots=True)
class Session:
    """A session, as it was opened."""

    id: str
    created_s: float
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])


SESSIONS = Kind("session", Session)


class Sessions:
    """Sessions by id. A restart of the service counts as a heartbeat of all of them."""

    def __init__(self, records: Records, now_s: Callable[[], float]) -> None:
        self._records = records
        self._now_s = now_s
        self._beats_s = dict.fromkeys(records.list(SESSIONS), now_s())

    async def open(self, metadata: Mapping[str, Any]) -> str:
        """Begin a session; its id."""
        session = Session(f"session-{uuid4().hex}", self._now_s(), dict(metadata))
        await self._records.put(SESSIONS, session.id, session)
        self._beats_s[session.id] = session.created_s
        return session.id

    def beat(self, session_id: str) -> None:
        """It is still there. Raises `UserError` for one that is unknown or was given up."""
        if session_id not in self._beats_s:
            raise UserError(f"session {session_id[:100]!r} is unknown or was given up: create another one")
        self._beats_s[session_id] = self._now_s()

    async def give_up(self, now_s: float, limit_s: float) -> tuple[str, ...]:
        """Forget the sessions without a heartbeat for `limit_s`; their ids."""
        lost = tuple(session_id for session_id, beat_s in self._beats_s.items() if now_s - beat_s >= limit_s)
        for session_id in lost:
            del self._beats_s[session_id]
            await self._records.delete(SESSIONS, session_id)
        return lost
