"""What the world says after a turn of the policy, as tokens to append to the sampled ones.

Rendering the conversation again would tokenise the policy's own words again, and differently. Instead a stand-in
conversation is rendered twice, with and without the new messages; the difference is the template's text between
the end of an assistant turn and the next generation prompt, whatever was said before.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlorch.errors import DataError, ModelError
from rlorch.ports import Tokenizer
from rlorch.render.chat import Message, Tool, chat_text
from rlorch.types import Tokens

_ASKED, _SAID = "rlorch asked", "rlorch said"


def render_observation(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    turn_closed: bool,
    options: Mapping[str, Any] | None = None,
    tools: Sequence[Tool] = (),
) -> Tokens:
    """Tokens (int32) of `messages` and the next generation prompt, as they follow an assistant turn.

    `turn_closed` says that the policy sampled the end-of-turn token itself; otherwise (a stop string) the tokens
    returned begin with it.

    Raises:
        ModelError: the tokenizer has no chat template.
        DataError: the template refuses the messages, or does not write turns one after the other.
    """
    options = options or {}
    stand_in: list[Message] = [{"role": "user", "content": _ASKED}, {"role": "assistant", "content": _SAID}]
    before = chat_text(stand_in, tokenizer, add_generation_prompt=False, options=options, tools=tools)
    after = chat_text([*stand_in, *messages], tokenizer, add_generation_prompt=True, options=options, tools=tools)
    said = before.rfind(_SAID) + len(_SAID)
    if _SAID not in before or not after.startswith(before):
        roles = ", ".join(str(message.get("role", "?")) for message in messages)
        raise DataError(f"the chat template rewrites the assistant turn when [{roles}] follows; use text observations")
    following = tokenizer.encode(after[said:], add_special_tokens=False)
    if turn_closed:
        if tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no EOS token, so the end of an assistant turn is unknown")
        if tokenizer.eos_token_id in tokenizer.encode(before[said:], add_special_tokens=False):
            following = following[following.index(tokenizer.eos_token_id) + 1 :]
    return np.asarray(following, dtype=np.int32)
