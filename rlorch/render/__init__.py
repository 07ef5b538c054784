"""Rows, messages and tools to tokens through the tokenizer's own chat template, and sampled tokens back to messages.

Everything here is a pure function of its arguments and of the `Tokenizer` port. Two properties hold for whatever
template the tokenizer has, or an error names the message that breaks them:

* *The split is exact.* A supervised example is tokenised in pieces that end where the generation prompt ends, so
  its first tokens are the very tokens that the policy is prompted with when it samples.
* *Nothing is tokenised twice.* What an environment says after a turn is rendered as the text that follows the
  turn's end, and its tokens are appended to the sampled ones (`render_observation`). Where a conversation is rendered
  again as a whole, `extend` says whether the tokens there were are still its beginning.

What was sampled is read back by `parse_completion`, which never raises: a policy in training writes anything.
"""

from rlorch.render.chat import Message, Tool, render_messages
from rlorch.render.extend import Extension, extend
from rlorch.render.observation import render_observation
from rlorch.render.parse import ParsedCompletion, parse_completion
from rlorch.render.prompt import RenderSpec, completion_text, render_prompt
from rlorch.render.supervised import (
    Conversation,
    Supervised,
    TrainOn,
    render_supervised,
    supervised_example,
    to_datum,
)

__all__ = [
    "Conversation",
    "Extension",
    "Message",
    "ParsedCompletion",
    "RenderSpec",
    "Supervised",
    "Tool",
    "TrainOn",
    "completion_text",
    "extend",
    "parse_completion",
    "render_messages",
    "render_observation",
    "render_prompt",
    "render_supervised",
    "supervised_example",
    "to_datum",
]
