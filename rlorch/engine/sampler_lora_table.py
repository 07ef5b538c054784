"""The adapters of one engine by name, and when each may go. Owned by the engine's thread.

Invariants: a name stands for one content (digest) from its addition until its removal is complete; an adapter leaves
the backend only when no request uses it, and from the moment its removal is asked for no new request may name it.
"""

from collections.abc import Callable
from concurrent.futures import Future

from rlorch.engine.backend import Backend
from rlorch.engine.requests import fail, finish
from rlorch.engine.sampler_lora import Adapter
from rlorch.errors import ModelError, UserError


class AdapterTable:
    """The table. `backend` is set before the first adapter."""

    backend: Backend

    def __init__(self) -> None:
        self._digests: dict[str, str] = {}
        self._leaving: dict[str, list[Future[None]]] = {}

    def add(self, adapter: Adapter) -> None:
        """Load an adapter; nothing happens when it is there. Raises as `SamplerEngine.add_adapter`."""
        if adapter.name in self._leaving:
            raise UserError(f"adapter {adapter.name!r} is being removed: add it again when it is gone")
        held = self._digests.get(adapter.name)
        if held is None:
            self.backend.add_adapter(adapter)
            self._digests[adapter.name] = adapter.digest
        elif held != adapter.digest:
            raise ModelError(
                f"adapter {adapter.name!r} has other weights ({held}, not {adapter.digest}): a name never gets other "
                "weights; give each version a name of its own"
            )

    def check(self, name: str | None) -> None:
        """Raise `UserError` for an adapter that a new request may not name; None is the base."""
        if name is None or (name in self._digests and name not in self._leaving):
            return
        known = sorted(self._digests.keys() - self._leaving.keys())
        raise UserError(f"there is no adapter {name!r}, only {known}: add it first")

    def remove(self, name: str, future: Future[None]) -> None:
        """End the future when `retire` has unloaded the adapter; at once when there is none."""
        if name in self._digests:
            self._leaving.setdefault(name, []).append(future)
        else:
            finish(future, None)

    def retire(self, in_use: Callable[[str], bool]) -> None:
        """Unload what shall leave and is not in use."""
        for name in [name for name in self._leaving if not in_use(name)]:
            self.backend.remove_adapter(name)
            del self._digests[name]
            for future in self._leaving.pop(name):
                finish(future, None)

    def lose(self, error: Exception) -> None:
        """End every future; the backend is gone."""
        while self._leaving:
            for future in self._leaving.popitem()[1]:
                fail(future, error)
