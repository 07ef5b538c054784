"""A training loss of your own: any torch function of log-probabilities, with its exact gradient.

    python examples/custom_loss.py path/to/model

The loss sees the log-probs of all rows at once, so it may compare rows: here it wants one answer to be likelier than
another by a margin (a hinge, where DPO has a sigmoid). The model stays where the trainer is: only log-probs come here,
and weights go back.
"""

import asyncio
import sys
import tempfile

import torch

from rlorch.local import LocalRuntime
from rlorch.recipes.custom_loss import forward_backward_custom
from rlorch.render.supervised import render_supervised, to_datum
from rlorch.specs import RuntimeSpec
from rlorch.types import AdamParams, Datum

PAIRS = [("The sky is", " blue", " green"), ("Grass is", " green", " blue")]
MARGIN = 2.0


def hinge(datums: list[Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """Mean of max(0, MARGIN - (good - bad)), over rows good, bad, good, bad, ..."""
    answers = [lp @ torch.as_tensor(datum.loss_inputs["weights"]) for datum, lp in zip(datums, logprobs, strict=True)]
    differences = torch.stack(answers[0::2]) - torch.stack(answers[1::2])
    return (MARGIN - differences).clamp(min=0).mean(), {"difference": differences.mean().item()}


async def main(model: str) -> None:
    """Twenty steps, printed."""
    with tempfile.TemporaryDirectory() as folder:
        runtime = LocalRuntime(RuntimeSpec(model=model, run_dir=folder, roles=("trainer",)))
        try:
            tokenizer = runtime.tokenizer()
            examples = [(prompt, answer) for prompt, *answers in PAIRS for answer in answers]
            rendered = [render_supervised(example, tokenizer) for example in examples]
            datums = [to_datum(example.tokens_T, example.weights_T) for example in rendered]
            trainer = await runtime.trainer()
            for step in range(20):
                measured = await forward_backward_custom(trainer, datums, hinge)
                await trainer.optim_step(AdamParams(learning_rate=1e-4), "none")
                print(f"step {step}: loss {measured['loss']:.4f}, difference {measured['difference']:.4f}")
        finally:
            await runtime.stop()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
