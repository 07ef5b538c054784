"""Is a replica stuck? Pure, and keyed on progress.

A replica is lost when it has had something in flight for `bound_s` seconds during which neither its token counter nor
the number of answered sequences moved. Having much in flight is not a symptom (long answers), and having something
always in flight is normal under load: only the absence of progress is.
"""

from dataclasses import dataclass


@dataclass
class Watchdog:
    """Progress of one replica.

    Args:
        bound_s: seconds without progress that mean lost; longer than the longest prefill, commit and poll together.
    """

    bound_s: float
    _mark: tuple[int, int] = (-1, -1)
    _since: float | None = None

    def check(self, now: float, in_flight: int, generated_tokens: int | None, answered: int) -> bool:
        """Take a reading; True when the replica must be declared lost.

        `generated_tokens` is None when the replica did not answer the poll: that is no progress, unless it answered
        sequences meanwhile.
        """
        tokens = self._mark[0] if generated_tokens is None else generated_tokens
        if in_flight == 0 or self._since is None or (tokens, answered) != self._mark:
            self._mark = (tokens, answered)
            self._since = now
        return now - self._since >= self.bound_s

    def excuse(self, now: float) -> None:
        """Something else than work kept the replica busy (a weight load or commit): count from here."""
        self._since = now

    def stalled_s(self, now: float) -> float:
        """Seconds without progress."""
        return 0.0 if self._since is None else now - self._since
