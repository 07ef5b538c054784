"""Rows and messages to tokens, through the tokenizer's own chat template.

Everything here is a pure function of its arguments and of the `Tokenizer` port. Two properties hold for whatever
template the tokenizer has, or an error names the message that breaks them:

* *The split is exact.* A supervised example is tokenised in pieces that end where the generation prompt ends, so
  its first tokens are the very tokens that the policy is prompted with when it samples.
* *Nothing is tokenised twice.* What an environment says after a turn is rendered as the text that follows the
  turn's end, and its tokens are appended to the sampled ones (`render_observation`).
"""

from rlorch.render.observation import render_observation
from rlorch.render.prompt import Message, RenderSpec, completion_text, render_prompt
from rlorch.render.supervised import Supervised, TrainOn, render_supervised, supervised_example, to_datum

__all__ = [
    "Message",
    "RenderSpec",
    "Supervised",
    "TrainOn",
    "completion_text",
    "render_observation",
    "render_prompt",
    "render_supervised",
    "supervised_example",
    "to_datum",
]
