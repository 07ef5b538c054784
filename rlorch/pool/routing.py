"""Which replica a request goes to: pure, from counts of what this process has sent and not got back.

Load is in-flight tokens per sequence of window, so that replicas of different speed fill evenly. Polled load would be
stale by the time it is used and would send bursts to one place; what was sent is known at once.

1. A session (a multi-turn rollout) goes to the replica that holds its prefix, as long as that one is routable: it
   waits there rather than compute the prefix again elsewhere.
2. A prompt that was sent recently goes to the same replica, if there is room and its load is at most 1.25 times the
   mean (consistent hashing with bounded loads, arXiv:1608.01350, bounds affinity the same way).
3. Anything else goes to the least loaded replica with room; equal loads go by name.

All n completions of one request are on one replica: they share the prefill.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

LOAD_BOUND = 1.25  # times the mean load: above it, affinity costs more in queueing than the prefix saves
MAX_SESSIONS = 65_536  # remembered placements; the oldest is forgotten, which costs one prefill
MAX_PREFIXES = 4_096

K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class Request:
    """What routing knows of a request: sequences, expected KV tokens, and what it would like to be near to."""

    sequences: int
    tokens: float
    session: str | None = None
    prefix: int | None = None


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """A routable replica: sequences and expected tokens in flight. `open` means that this request may enter now."""

    name: str
    window: int
    in_flight: int
    tokens: float
    open: bool

    @property
    def load(self) -> float:
        """In-flight tokens per sequence of window."""
        return self.tokens / max(self.window, 1)


def has_room(window: int, in_flight: int, sequences: int) -> bool:
    """Whether `sequences` more fit the window. A request larger than the window enters an empty replica, alone."""
    return in_flight + sequences <= window or in_flight == 0


class Router:
    """Places requests and remembers where sessions and prompts went."""

    def __init__(self) -> None:
        self._sessions: _Recent[str] = _Recent(MAX_SESSIONS)
        self._prefixes: _Recent[int] = _Recent(MAX_PREFIXES)

    def home(self, request: Request, replicas: Sequence[ReplicaLoad]) -> str | None:
        """The replica that the request's session must go to; None when it may go anywhere."""
        if request.session is None:
            return None
        home = self._sessions.get(request.session)
        return home if any(replica.name == home for replica in replicas) else None

    def choose(self, request: Request, replicas: Sequence[ReplicaLoad]) -> str | None:
        """The routable replica to send the request to now; None means wait."""
        home = self.home(request, replicas)
        if home is not None:
            return home if any(replica.name == home and replica.open for replica in replicas) else None
        candidates = [replica for replica in replicas if replica.open]
        if not candidates:
            return None
        if request.prefix is not None and (near := self._prefixes.get(request.prefix)) is not None:
            bound = LOAD_BOUND * sum(replica.load for replica in replicas) / len(replicas)
            if any(replica.name == near and replica.load <= bound for replica in candidates):
                return near
        return min(candidates, key=lambda replica: (replica.load, replica.name)).name

    def sent(self, request: Request, name: str) -> None:
        """Remember that the request went to `name`."""
        if request.session is not None:
            self._sessions.put(request.session, name)
        if request.prefix is not None:
            self._prefixes.put(request.prefix, name)

    def forget(self, name: str) -> None:
        """A replica is gone, and so are the prefixes it held."""
        self._sessions.drop(name)
        self._prefixes.drop(name)


class _Recent(Generic[K]):
    """The last `capacity` keys and their replica."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._entries: OrderedDict[K, str] = OrderedDict()

    def get(self, key: K) -> str | None:
        return self._entries.get(key)

    def put(self, key: K, name: str) -> None:
        self._entries[key] = name
        self._entries.move_to_end(key)
        if len(self._entries) > self._capacity:
            self._entries.popitem(last=False)

    def drop(self, name: str) -> None:
        for key in [key for key, value in self._entries.items() if value == name]:
            del self._entries[key]
