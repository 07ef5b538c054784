"""The training API from end to end, on a CPU, in about a minute: a trainer, a deployment, a loss of your own, snapshots
that reach the deployment without a restart, sampling, evaluation, a client that comes back, and a promoted model.

    python examples/training_api.py [model directory]

It is the walkthrough of the Fireworks Training API with its import lines, model and shape changed, and the functions
written out that it leaves to its reader. `FIREWORKS_BASE_URL` says where it runs: "local" (the default here) is this
process; "ray" is the Ray cluster of this machine.

The task: the tiny model, which begins with random weights, learns to spell four words backward.
"""

import asyncio
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import tinker
import torch
from transformers import AutoTokenizer

from rlorch import (
    AdaptiveConcurrencyController,
    DeploymentConfig,
    DeploymentManager,
    DeploymentSampler,
    FiretitanServiceClient,
    SampledCompletion,
    TrainerJobConfig,
    TrainerJobManager,
    WeightSyncer,
    datum_from_model_input_weights,
)
from rlorch.engine.tiny import make_tiny_model

WORDS = ("sun", "moon", "tree", "rain")
TOTAL_STEPS = 60
EVAL_INTERVAL = 20

model = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="rlorch-tiny-")
if not os.path.exists(os.path.join(model, "config.json")):
    make_tiny_model(model)
tokenizer = AutoTokenizer.from_pretrained(model)


def question(word: str) -> list[dict[str, str]]:
    """The conversation that is answered."""
    return [{"role": "user", "content": word}]


def build_batch(step: int) -> list[tinker.Datum]:
    """A row for each word: the prompt with weight 0, the answer with weight 1."""
    rows: list[tinker.Datum] = []
    for word in WORDS:
        prompt = tokenizer.apply_chat_template(question(word), tokenize=False, add_generation_prompt=True)
        prompt_tokens = tokenizer.encode(prompt, add_special_tokens=False)
        answer_tokens = tokenizer.encode(word[::-1] + tokenizer.eos_token, add_special_tokens=False)
        weights = torch.tensor([0.0] * len(prompt_tokens) + [1.0] * len(answer_tokens))
        tokens = tinker.ModelInput.from_ints(prompt_tokens + answer_tokens)
        rows.append(datum_from_model_input_weights(tokens, weights, max_length=64))
    return rows


def compute_objective(data: list[tinker.Datum], logprobs_list: list[torch.Tensor]) -> torch.Tensor:
    """Any differentiable function of the log-probabilities. Here: the worst answer counts most (a soft maximum of the
    rows' mean losses), which no sum over tokens can say."""
    weights = [row.loss_fn_inputs["weights"].to_torch() for row in data]
    losses = [-(lp * w).sum() / w.sum() for lp, w in zip(logprobs_list, weights, strict=True)]
    return torch.logsumexp(torch.stack(losses), 0)


def evaluate_responses(completions: list[list[SampledCompletion]]) -> float:
    """Share of the words that were spelled backward."""
    answers = [one.text for (one,) in completions]
    return sum(answer == word[::-1] for answer, word in zip(answers, WORDS, strict=True)) / len(WORDS)


# --- 1. Bootstrap -----------------------------------------------------------------------------------------

api_key = os.environ.get("FIREWORKS_API_KEY", "local")
base_url = os.environ.get("FIREWORKS_BASE_URL", "local")
shape_id = "accounts/fireworks/trainingShapes/qwen3-tiny-cpu"

rlor_mgr = TrainerJobManager(api_key=api_key, base_url=base_url)
deploy_mgr = DeploymentManager(api_key=api_key, base_url=base_url)

profile = rlor_mgr.resolve_training_profile(shape_id)
created = rlor_mgr.create(
    TrainerJobConfig(
        base_model=model,
        training_shape_ref=profile.training_shape_version,
        lora_rank=0,
        learning_rate=1e-3,
    )
)
print(f"Trainer requested: {created.job_id}")

deploy_info = deploy_mgr.create_or_get(
    DeploymentConfig(
        deployment_id=f"research-{created.job_id}",
        base_model=model,
        hot_load_trainer_job=created.job_name,
        min_replica_count=0,
        max_replica_count=1,
        engine="transformers",
        max_model_len=128,
        max_num_seqs=16,
    )
)
with ThreadPoolExecutor(max_workers=2) as pool:
    trainer_future = pool.submit(rlor_mgr.wait_for_ready, created.job_id)
    deploy_future = pool.submit(deploy_mgr.wait_for_ready, deploy_info.deployment_id)
    endpoint = trainer_future.result()
    deploy_info = deploy_future.result()

service = FiretitanServiceClient(base_url=endpoint.base_url, api_key=api_key)
training_client = service.create_training_client(base_model=model, lora_rank=0)

# --- 2. Train with a custom objective, 3. checkpoint, sync, evaluate --------------------------------------


def objective(data: list[tinker.Datum], logprobs_list: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """The objective and what to report of it."""
    loss = compute_objective(data=data, logprobs_list=logprobs_list)
    return loss, {"loss": float(loss.item())}


tracker = WeightSyncer(
    policy_client=training_client,
    deploy_mgr=deploy_mgr,
    deployment_id=deploy_info.deployment_id,
    base_model=model,
    hotload_timeout=600,
    first_checkpoint_type="base",
)
sampler = DeploymentSampler(
    inference_url=deploy_mgr.inference_url,
    model=f"accounts/{deploy_mgr.account_id}/deployments/{deploy_info.deployment_id}",
    api_key=api_key,
    tokenizer=tokenizer,
    concurrency_controller=AdaptiveConcurrencyController(initial_window=16),
)
adam_params = tinker.AdamParams(learning_rate=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)


async def sample_answers() -> list[list[SampledCompletion]]:
    """One greedy completion for each word, through the deployment."""
    return [await sampler.sample_with_tokens(question(word), n=1, max_tokens=8, temperature=0.0) for word in WORDS]


for step in range(1, TOTAL_STEPS + 1):
    batch = build_batch(step)
    result = training_client.forward_backward_custom(batch, objective).result()
    training_client.optim_step(adam_params).result()
    if step % EVAL_INTERVAL == 0:
        snapshot = tracker.save_and_hotload(f"step-{step:05d}")  # base first, then delta
        completions = asyncio.run(sample_answers())
        served = {one.checkpoint_identity for (one,) in completions}
        assert served == {snapshot}, f"sampled from {served}, expected {snapshot}"
        score = evaluate_responses(completions)
        print({"step": step, "loss": round(result.metrics["loss"], 3), "eval_score": score, "checkpoint": snapshot})

# --- 4. The client goes away and comes back: weights, optimizer and step are those of before --------------

service.close()
endpoint = rlor_mgr.reconnect_and_wait(created.job_id, timeout_s=300)
service = FiretitanServiceClient(base_url=endpoint.base_url, api_key=api_key)
training_client = service.create_training_client(base_model=model, lora_rank=0)
training_client.forward_backward_custom(build_batch(TOTAL_STEPS + 1), objective).result()
metrics = training_client.optim_step(adam_params).result().metrics or {}
print(f"Reconnected: this was step {metrics['step']:.0f}")

# --- 5. A state to resume from, and a model directory of the last snapshot --------------------------------

training_client.save_state("final", ttl_seconds=7 * 24 * 3600).result()
final = training_client.save_weights_for_sampler_ext("final", checkpoint_type="base")
rows = {row["name"]: row for row in rlor_mgr.list_checkpoints(created.job_id)}
assert rows[final.path]["promotable"]
promoted = rlor_mgr.promote_checkpoint(name=final.path, output_model_id=f"spell-backward-{created.job_id[-8:]}")
print(f"Promoted: {promoted['name']} in {promoted['path']}")

deploy_mgr.delete(deploy_info.deployment_id)
rlor_mgr.delete(created.job_id)
