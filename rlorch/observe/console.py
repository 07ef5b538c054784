"""The terminal: a live view of a run, or one plain line per step where there is no terminal.

coordinator --get_view()--> RunView --> Console.update (event loop) --> rich's refresh thread --> terminal
"""

import asyncio
import logging
from collections.abc import Callable

import rich.console
from rich.console import RenderableType
from rich.live import Live
from rich.text import Text

from rlorch.observe.frame import final_table, render
from rlorch.observe.units import bytes_text, clock_text, count_text, seconds_text
from rlorch.observe.view import RunView

__all__ = ["Console", "final_table", "render", "step_line"]

log = logging.getLogger(__name__)


def step_line(view: RunView) -> str:
    """The state after a step as one line of text."""
    parts = [f"step {view.step}/{view.total_steps}", clock_text(view.elapsed_s)]
    if view.reward_train:
        parts.append(f"reward {view.reward_train[-1][1]:.3f}")
    if view.reward_held_out:
        step, sampled, greedy = view.reward_held_out[-1]
        parts.append(
            f"held out {sampled:.3f}" + (f" greedy {greedy:.3f}" if greedy is not None else "") + f" (step {step})"
        )
    total = sum(view.staleness.values())
    if total:
        parts.append(f"staleness {sum(s * n for s, n in view.staleness.items()) / total:.2f}")
    parts.append(f"{count_text(view.tokens_per_s)} tokens/s")
    if view.delta_bytes_last is not None:
        parts.append(f"sent {bytes_text(view.delta_bytes_last)}")
    if view.pause_s_last is not None:
        parts.append(f"pause {seconds_text(view.pause_s_last)}")
    if view.rollouts.dropped:
        parts.append(f"dropped {sum(view.rollouts.dropped.values()):,}")
    return " | ".join(parts)


class Console:
    """Shows a run while the `with` block lasts.

    On a terminal: a live view, redrawn by rich's own thread from the last view taken. Elsewhere (a file, a pipe, an
    encoding without block characters): one line for each new step. `get_view` is only called by `update`, on the
    caller's thread; if it raises, the display ends with one warning and the run goes on.

    Args:
        get_view: builds a `RunView` of this moment.
        output: where to draw; default stderr, so that stdout stays free.
        refresh_s: seconds between redraws.
    """

    def __init__(
        self,
        get_view: Callable[[], RunView],
        *,
        output: rich.console.Console | None = None,
        refresh_s: float = 0.5,
    ) -> None:
        self._get_view = get_view
        self._output = output or rich.console.Console(stderr=True)
        self._draws = self._output.is_terminal and self._output.encoding.lower().startswith("utf")
        self._refresh_s = refresh_s
        self._view: RunView | None = None
        self._printed_step = -1
        self._broken = False
        self._live: Live | None = None

    def __enter__(self) -> "Console":
        self.update()
        if self._draws:
            self._live = Live(
                get_renderable=self._frame, console=self._output, refresh_per_second=max(1 / self._refresh_s, 1)
            )
            self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.update()
        if self._live:
            self._live.stop()
            self._live = None

    def update(self) -> None:
        """Take a new view; without a terminal, print it when its step is new. Call it after each step."""
        if self._broken:
            return
        try:
            self._view = self._get_view()
        except Exception as error:
            self._broken = True
            log.warning(f"the live view ends here, the run goes on: {type(error).__name__}: {error}", exc_info=True)
            return
        if not self._draws and self._view.step > self._printed_step:
            self._printed_step = self._view.step
            self._output.print(Text(step_line(self._view)), soft_wrap=True)

    async def run(self) -> None:
        """Keep the view fresh until cancelled: a task beside the run's own."""
        while True:  # a redraw answers to no event, only to time that passes
            self.update()
            await asyncio.sleep(self._refresh_s)

    def _frame(self) -> RenderableType:
        return render(self._view, self._output.width) if self._view else Text("")
