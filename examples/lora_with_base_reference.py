"""An adapter and its reference on one trainer: the frozen base scores, the adapter learns, no second copy of the model.

    python examples/lora_with_base_reference.py [model directory]

Direct preference optimisation (arXiv 2305.18290, equation 7): -log sigmoid(beta [(log p(chosen) - log p_ref(chosen)) -
(log p(rejected) - log p_ref(rejected))]). The reference log-probabilities come from `create_base_training_client`: the
same base model with the adapter off. The adapter is then saved, and loaded into a second one.

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

BETA = 0.1
CHOSEN, REJECTED = [10, 11, 12, 13], [10, 21, 22, 23]


def make_row(tokens: list[int]) -> tinker.Datum:
    """A row in which every token counts."""
    return datum_from_model_input_weights(tinker.ModelInput.from_ints(tokens), torch.ones(len(tokens)))


def main() -> None:
    """Train an adapter against its base, save it, load it again."""
    model = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="rlorch-tiny-")
    if not (Path(model) / "config.json").exists():
        make_tiny_model(model)
    manager = TrainerJobManager(base_url=os.environ.get("FIREWORKS_BASE_URL", "local"))
    profile = manager.resolve_training_profile("qwen3-tiny-cpu-lora")
    shape = profile.training_shape_version
    endpoint = manager.create_and_wait(TrainerJobConfig(model, lora_rank=8, training_shape_ref=shape))
    service = ServiceClient(endpoint)
    policy = service.create_lora_training_client(model, rank=8)
    reference = service.create_base_training_client(model)

    pair = [make_row(CHOSEN), make_row(REJECTED)]
    outputs = reference.forward(pair).result().loss_fn_outputs
    reference_sums = torch.stack([output["logprobs"].to_torch().sum() for output in outputs])

    def dpo(data: list[tinker.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        rewards = BETA * (torch.stack([lp.sum() for lp in logprobs]) - reference_sums)
        margin = rewards[0] - rewards[1]
        return -F.logsigmoid(margin), {"margin": float(margin.detach())}

    for step in range(1, 11):
        result = policy.forward_backward_custom(pair, dpo).result()
        policy.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
        print(
            {"step": step, "loss": round(result.metrics["loss:sum"], 4), "margin": round(result.metrics["margin"], 4)}
        )

    saved = policy.save_weights_for_sampler_ext("preferred")
    other = ServiceClient(endpoint).create_lora_training_client(model, rank=8)
    other.load_adapter(saved.path).result()
    one = policy.forward(pair).result().loss_fn_outputs[0]["logprobs"].to_torch()
    two = other.forward(pair).result().loss_fn_outputs[0]["logprobs"].to_torch()
    print(f"adapter {saved.snapshot_name} loaded: log-probabilities differ by {(one - two).abs().max():.1e}")
    manager.delete(endpoint.job_id)


if __name__ == "__main__":
    main()
