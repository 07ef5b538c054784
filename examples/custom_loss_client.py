"""Losses of your own on a trainer: a few objectives that no built-in loss says, each exact.

    python examples/custom_loss_client.py [model directory]

`forward_backward_custom(data, loss_fn)` gives `loss_fn` the log-probabilities of the targets as torch tensors with
gradient, in this process. It returns any scalar and metrics; its derivative by each log-probability is what the trainer
continues the backward pass with. So a loss may couple tokens, rows and pairs, and read whatever a datum carries.

Runs in this process on a tiny model; `FIREWORKS_BASE_URL=ray` runs it on the Ray cluster of this machine.
"""

import os
import sys
import tempfile
from pathlib import Path

import tinker
import torch
import torch.nn.functional as F

from rlorch import ServiceClient, TrainerJobConfig, TrainerJobManager, datum_from_model_input_weights
from rlorch.engine.tiny import make_tiny_model

Logprobs = list[torch.Tensor]
Outcome = tuple[torch.Tensor, dict[str, float]]


def best_of_pair(data: list[tinker.Datum], logprobs: Logprobs) -> Outcome:
    """Prefer row 2i to row 2i+1: -log sigmoid of the difference of their summed log-probabilities."""
    weights = [row.loss_fn_inputs["weights"].to_torch() for row in data]
    sums = torch.stack([(lp * w).sum() for lp, w in zip(logprobs, weights, strict=True)])
    margins = sums[0::2] - sums[1::2]
    return -F.logsigmoid(margins).mean(), {"margin": float(margins.mean().detach())}


def entropy_of_rows(data: list[tinker.Datum], logprobs: Logprobs) -> Outcome:
    """Spread the mass over the rows: the negative entropy of their normalised probabilities."""
    log_p = torch.stack([lp.sum() for lp in logprobs]).log_softmax(0)
    return (log_p.exp() * log_p).sum(), {"entropy": float(-(log_p.exp() * log_p).sum().detach())}


def clipped_policy_gradient(data: list[tinker.Datum], logprobs: Logprobs) -> Outcome:
    """PPO's clipped surrogate; `advantages` and `old_logprobs` stay in this process."""
    losses: Logprobs = []
    for row, lp in zip(data, logprobs, strict=True):
        advantages = row.loss_fn_inputs["advantages"].to_torch()
        ratio = (lp - row.loss_fn_inputs["old_logprobs"].to_torch()).exp()
        losses.append(-torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum())
    return torch.stack(losses).sum(), {}


def make_row(tokens: list[int]) -> tinker.Datum:
    """A row in which every token counts."""
    return datum_from_model_input_weights(tinker.ModelInput.from_ints(tokens), torch.ones(len(tokens)))


def main() -> None:
    """Train a few steps with each loss."""
    model = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="rlorch-tiny-")
    if not (Path(model) / "config.json").exists():
        make_tiny_model(model)
    manager = TrainerJobManager(base_url=os.environ.get("FIREWORKS_BASE_URL", "local"))
    profile = manager.resolve_training_profile("qwen3-tiny-cpu")
    endpoint = manager.create_and_wait(TrainerJobConfig(model, training_shape_ref=profile.training_shape_version))
    client = ServiceClient(endpoint).create_training_client(model)
    adam = tinker.AdamParams(learning_rate=1e-3)

    rows = [make_row([10, 11, 12, 13]), make_row([10, 21, 22, 23])]
    for loss_fn in (best_of_pair, entropy_of_rows):
        for step in range(1, 6):
            result = client.forward_backward_custom(rows, loss_fn)
            client.optim_step(adam).result()  # operations run in the order of the calls
            print(loss_fn.__name__, step, {name: round(value, 4) for name, value in result.result().metrics.items()})

    old = client.forward(rows)
    advantages = (1.0, -1.0)
    policy_rows = [
        tinker.Datum(
            model_input=row.model_input,
            loss_fn_inputs={
                "target_tokens": row.loss_fn_inputs["target_tokens"],
                "old_logprobs": output["logprobs"],
                "advantages": tinker.TensorData.from_torch(torch.full((3,), advantage)),
            },
        )
        for row, output, advantage in zip(rows, old.result().loss_fn_outputs, advantages, strict=True)
    ]
    # The weights are those of `old`: the first step needs no second forward.
    result = client.forward_backward_custom(policy_rows, clipped_policy_gradient, precomputed_forward=old).result()
    client.optim_step(adam).result()
    print(clipped_policy_gradient.__name__, {"loss": round(result.metrics["loss:sum"], 4)})
    manager.delete(endpoint.job_id)


if __name__ == "__main__":
    main()
