"""The life of a research loop on a real service in this process: trainer, deployment, deltas, reconnect, promotion."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
import torch

from rlorch import (
    AdaptiveConcurrencyController,
    DeploymentConfig,
    DeploymentManager,
    DeploymentSampler,
    FiretitanServiceClient,
    ServiceClient,
    TrainerJobConfig,
    TrainerJobManager,
    WeightSyncer,
    datum_from_model_input_weights,
)
from rlorch.errors import UserError
from rlorch.sdk.connection import HUB
from rlorch.sdk.job_config import CreatedTrainerJob, TrainerServiceEndpoint
from rlorch.sdk.training_client import TrainingClient

pytestmark = pytest.mark.engine

SHAPE = "accounts/fireworks/trainingShapes/qwen3-tiny-cpu"
ADAM = tinker.AdamParams(learning_rate=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)
QUESTION = [{"role": "user", "content": "sun"}]


@dataclass
class World:
    """A trainer and the deployment that serves it."""

    base_url: str
    model: str
    jobs: TrainerJobManager
    deploy: DeploymentManager
    job: CreatedTrainerJob
    endpoint: TrainerServiceEndpoint
    tokenizer: Any
    batch: list[tinker.Datum] = field(default_factory=list[tinker.Datum])

    def client(self) -> TrainingClient:
        service = FiretitanServiceClient(base_url=self.endpoint.base_url, api_key="key")
        return service.create_training_client(base_model=self.model, lora_rank=0)

    def logprobs(self, client: TrainingClient) -> list[list[float]]:
        return [output["logprobs"].tolist() for output in client.forward(self.batch).result(60).loss_fn_outputs]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    from rlorch.engine.tiny import make_tiny_model
    from rlorch.engine.tokenizer import load_tokenizer

    model = str(tmp_path_factory.mktemp("model"))
    make_tiny_model(model)
    base_url = f"local:{tmp_path_factory.mktemp('service')}"
    jobs, deploy = TrainerJobManager(api_key="key", base_url=base_url), DeploymentManager("key", base_url)
    profile = jobs.resolve_training_profile(SHAPE)
    config = TrainerJobConfig(model, training_shape_ref=profile.training_shape_version, gradient_accumulation_steps=4)
    job = jobs.create(config)
    serving = DeploymentConfig(
        "research-serving", model, hot_load_trainer_job=job.job_name, engine="transformers", max_model_len=64,
        max_num_seqs=8,
    )  # fmt: skip
    deploy.create_or_get(serving)
    with ThreadPoolExecutor(max_workers=2) as pool:
        ready = pool.submit(deploy.wait_for_ready, "research-serving")
        endpoint = pool.submit(jobs.wait_for_ready, job.job_id).result()
        ready.result()
    tokenizer = load_tokenizer(model)
    tokens = [*tokenizer.encode("sun\nnus", add_special_tokens=False), tokenizer.eos_token_id]
    weights = torch.tensor([0.0] * 4 + [1.0] * 4)
    batch = [datum_from_model_input_weights(tinker.ModelInput.from_ints(tokens), weights)]
    yield World(base_url, model, jobs, deploy, job, endpoint, tokenizer, batch)
    HUB.close()


def objective(data: list[tinker.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    weights = [row.loss_fn_inputs["weights"].to_torch() for row in data]
    loss = torch.stack([-(lp * w).sum() for lp, w in zip(logprobs, weights, strict=True)]).sum()
    return loss, {"loss": float(loss.item())}


def train(client: TrainingClient, batch: list[tinker.Datum], steps: int) -> list[float]:
    losses: list[float] = []
    for _ in range(steps):
        losses.append(client.forward_backward_custom(batch, objective).result(60).metrics["loss"])
        client.optim_step(ADAM).result(60)
    return losses


def test_the_walkthrough_of_the_training_api(world: World) -> None:
    client = world.client()
    losses = train(client, world.batch, 15)
    assert losses[-1] < losses[0] / 3

    tracker = WeightSyncer(
        policy_client=client, deploy_mgr=world.deploy, deployment_id="research-serving", base_model=world.model,
        hotload_timeout=60, first_checkpoint_type="base",
    )  # fmt: skip
    tracker.save_and_hotload("step_00015")
    train(client, world.batch, 15)
    snapshot = tracker.save_and_hotload("step_00030")
    sampler = DeploymentSampler(
        inference_url=world.deploy.inference_url,
        model=f"accounts/{world.deploy.account_id}/deployments/research-serving",
        api_key="key",
        tokenizer=world.tokenizer,
        concurrency_controller=AdaptiveConcurrencyController(initial_window=16),
    )
    completions = asyncio.run(sampler.sample_with_tokens(messages=QUESTION, n=3, max_tokens=8, temperature=0.0))
    rows = {row["name"].rpartition("/")[2]: row for row in world.jobs.list_checkpoints(world.job.job_id)}
    assert [one.text for one in completions] == ["nus"] * 3
    assert {(one.checkpoint_identity, one.content_hash) for one in completions} == {
        (snapshot, rows[snapshot]["digest"])
    }
    assert [row["checkpointType"] for row in rows.values()] == [
        "CHECKPOINT_TYPE_INFERENCE_BASE", "CHECKPOINT_TYPE_INFERENCE_ARC_V2",
    ]  # fmt: skip
    assert {metrics.status_code for metrics in sampler.drain_metrics()} == {200}

    # What is served is what is trained, up to the precision that is served.
    served = asyncio.run(sampler.score([*world.batch[0].model_input.to_ints(), world.tokenizer.eos_token_id]))
    np.testing.assert_allclose(served, world.logprobs(client)[0], atol=0.1)


def test_a_second_client_finds_weights_optimizer_and_step(world: World) -> None:
    first = world.client()
    train(first, world.batch, 1)
    before, step = world.logprobs(first), world.jobs.get(world.job.job_id)["step"]
    first.forward_backward_custom(world.batch, objective).result(60)  # never stepped: dropped when another attaches

    assert world.jobs.reconnect_and_wait(world.job.job_id, timeout_s=60) == world.endpoint
    second = world.client()
    assert world.logprobs(second) == before
    with pytest.raises(UserError, match="no forward_backward came before it"):
        second.optim_step(ADAM).result(60)
    train(second, world.batch, 1)
    assert world.jobs.get(world.job.job_id)["step"] == step + 1
    with pytest.raises(UserError, match="attached to it"):
        first.forward(world.batch).result(60)


def test_a_state_brings_back_what_was_saved(world: World) -> None:
    client = world.client()
    client.save_state("before", ttl_seconds=3600).result(60)
    before = world.logprobs(client)
    expected = train(client, world.batch, 2)
    assert world.logprobs(client) != before
    client.load_state_with_optimizer(client.resolve_checkpoint_path("before", world.job.job_id)).result(60)
    assert world.logprobs(client) == before
    assert train(client, world.batch, 2) == expected
    assert client.list_checkpoints() == ["before"]
    with pytest.raises(UserError, match="no-such-state"):
        client.load_state("no-such-state").result(60)


def test_a_promoted_snapshot_is_a_model_of_its_own(world: World) -> None:
    client = world.client()
    train(client, world.batch, 2)
    base = client.save_weights_for_sampler_ext("final", "base")
    delta = client.save_weights_for_sampler_ext("after", "delta")
    with pytest.raises(UserError, match="delta"):
        world.jobs.promote_checkpoint(name=delta.path, output_model_id="a-delta")
    promoted = world.jobs.promote_checkpoint(name=base.path, output_model_id="spells-backward")
    assert promoted["name"] == "accounts/local/models/spells-backward"
    assert (Path(promoted["path"]) / "config.json").is_file()
    assert world.jobs.model_is_moe(promoted["name"]) is False

    shape = world.jobs.resolve_training_profile("qwen3-tiny-cpu").training_shape_version
    again = world.jobs.create_and_wait(TrainerJobConfig(promoted["name"], training_shape_ref=shape))
    other = ServiceClient(again).create_training_client(promoted["name"])
    # The model directory has the precision that is served, bfloat16.
    np.testing.assert_allclose(world.logprobs(other)[0], world.logprobs(client)[0], atol=0.1)
    world.jobs.delete(again.job_id)
    assert world.jobs.get(again.job_id)["state"] == "JOB_STATE_DELETED"


def test_a_tinker_shaped_client_samples_a_snapshot_by_its_path(world: World) -> None:
    client = world.client()
    saved = client.save_weights_for_sampler("for-tinker").result(60)
    sampling = client.create_sampling_client(saved.path)
    prompt = tinker.ModelInput.from_ints(world.tokenizer.encode("sun\n"))
    answer = sampling.sample(prompt, 2, tinker.SamplingParams(max_tokens=4, temperature=1.0)).result(60)
    assert [len(sequence.tokens) == len(sequence.logprobs) > 0 for sequence in answer.sequences] == [True, True]
    assert sampling.get_tokenizer().eos_token_id == world.tokenizer.eos_token_id
