"""The prompt of the next turn of a conversation, and whether it continues the tokens there are.

A template may write an earlier turn otherwise once another follows (reasoning templates drop old reasoning), and a
message that was parsed and rendered again may not be what was sampled. Then the next prompt does not continue the
history: its log-probabilities and prefix cache are worth nothing, and the training row ends there. `extend` renders
the whole conversation, compares, and says which case it is; it never hides one.

Where the history must be kept whatever the template would write, `render_observation` appends to it.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from rlorch.ports import Tokenizer
from rlorch.render.chat import Message, Tool, render_messages
from rlorch.types import Tokens


@dataclass(frozen=True, slots=True, eq=False)
class Extension:
    """The next prompt: `text` as the template writes it, and `tokens_T` (int32) that spell it.

    `diverged_at` None: `tokens_T` begins with the history, token for token. Else it is the index of the first token of
    the history that the template writes otherwise, `detail` shows both texts from there, and `tokens_T` is the whole
    conversation tokenised anew.
    """

    text: str
    tokens_T: Tokens
    diverged_at: int | None = None
    detail: str = ""

    @property
    def keeps_prefix(self) -> bool:
        """Whether the history is the beginning of `tokens_T`."""
        return self.diverged_at is None


def extend(
    history_T: ArrayLike,
    messages: Sequence[Message],
    new_messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    tools: Sequence[Tool] = (),
    options: Mapping[str, Any] | None = None,
) -> Extension:
    """The prompt after `new_messages`.

    Args:
        history_T: every token read and sampled so far.
        messages: the conversation that they are, the last assistant turn included.
        new_messages: what follows it: tool results, a user's message.
        tokenizer: its template writes the prompt.
        tools: as they were for the history.
        options: of the template, as they were for the history.

    Raises:
        ModelError: the tokenizer has no chat template.
        DataError: the template refuses the messages.
    """
    history = [int(token) for token in np.asarray(history_T).ravel()]
    text, tokens_T = render_messages([*messages, *new_messages], tokenizer, tools=tools, options=options)
    if tokens_T[: len(history)].tolist() == history:
        return Extension(text, tokens_T)
    spelled = tokenizer.decode(history)
    if text.startswith(spelled):  # the same text, sampled in other tokens than an encoder chooses
        following = tokenizer.encode(text[len(spelled) :], add_special_tokens=False)
        return Extension(text, np.asarray([*history, *following], dtype=np.int32))
    common = next((at for at, (a, b) in enumerate(zip(spelled, text, strict=False)) if a != b), len(text))
    position = bisect_right(range(len(history)), common, key=lambda at: len(tokenizer.decode(history[: at + 1])))
    detail = f"the history goes on with {_start(spelled[common:])}, the template with {_start(text[common:])}"
    return Extension(text, tokens_T, min(position, len(history) - 1), detail)


def _start(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
