"""What every `Trainer` promises, as tests over one that a subclass starts.

One trainer serves a whole class; each test begins at version 0 by loading the checkpoint of a fresh one.
"""

import asyncio
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from rlorch.errors import ConfigError, StorageError, UserError, WeightsError
from rlorch.ports import Trainer, WeightStore
from rlorch.types import AdamParams, Datum, LossSpec

ADAM = AdamParams(learning_rate=1e-2)
CROSS_ENTROPY = LossSpec("cross_entropy")
VOCAB = 128


def row(seed: int, length: int = 12) -> Datum:
    rng = np.random.default_rng(seed)
    tokens_T = rng.integers(2, VOCAB, length + 1)
    return Datum(
        tokens_T[:-1], {"target_tokens": tokens_T[1:], "weights": (rng.random(length) < 0.7).astype(np.float32)}
    )


async def digests(trainer: Trainer, path: Path) -> Mapping[str, str]:
    """Digests of the weights and moments; the files are named after what they hold."""
    saved = await trainer.save(str(path))
    return {name: digest for name, digest in saved.items() if name.startswith(("weights", "optimizer"))}


class TrainerContract:
    """Subclasses define the class-scoped fixtures `started`, `store` and `fresh` (a checkpoint of version 0)."""

    @pytest.fixture
    async def trainer(self, started: Trainer, fresh: Path) -> Trainer:
        assert await started.load(str(fresh)) == 0
        return started

    async def test_forward_repeats_itself_and_changes_nothing(self, trainer: Trainer, tmp_path: Path) -> None:
        before = await digests(trainer, tmp_path / "a")
        first = await trainer.forward([row(0), row(1, 5)])
        again = await trainer.forward([row(0), row(1, 5)])
        assert [len(values) for values in first.logprobs] == [12, 5]
        for one, other in zip(first.logprobs, again.logprobs, strict=True):
            np.testing.assert_array_equal(one, other)
            assert (one < 0).all()
        assert await digests(trainer, tmp_path / "b") == before

    async def test_gradients_add_up_until_the_step(self, trainer: Trainer, fresh: Path, tmp_path: Path) -> None:
        await trainer.forward_backward([row(0)], CROSS_ENTROPY)
        await trainer.forward_backward([row(1)], CROSS_ENTROPY)
        assert (await trainer.optim_step(ADAM, "num_loss_tokens")).version == 1
        parts = (await trainer.forward([row(2)])).logprobs[0]
        await trainer.load(str(fresh))
        await trainer.forward_backward([row(0), row(1)], CROSS_ENTROPY)
        await trainer.optim_step(ADAM, "num_loss_tokens")
        np.testing.assert_allclose((await trainer.forward([row(2)])).logprobs[0], parts, atol=1e-4)

    async def test_training_makes_its_targets_likelier(self, trainer: Trainer) -> None:
        before = (await trainer.forward([row(0)])).logprobs[0]
        for _ in range(3):
            await trainer.forward_backward([row(0)], CROSS_ENTROPY)
            await trainer.optim_step(ADAM, "num_loss_tokens")
        weights = row(0).loss_inputs["weights"]
        assert float((((await trainer.forward([row(0)])).logprobs[0] - before) * weights).sum()) > 0

    async def test_calls_run_in_the_order_they_were_made(self, trainer: Trainer) -> None:
        async with asyncio.TaskGroup() as tasks:
            steps = []
            for seed in range(3):
                tasks.create_task(trainer.forward_backward([row(seed)], CROSS_ENTROPY))
                steps.append(tasks.create_task(trainer.optim_step(ADAM, "num_loss_tokens")))
        assert [step.result().version for step in steps] == [1, 2, 3]

    async def test_a_saved_trainer_goes_on_bit_for_bit(self, trainer: Trainer, tmp_path: Path) -> None:
        async def step(seed: int) -> None:
            await trainer.forward_backward([row(seed)], CROSS_ENTROPY)
            await trainer.optim_step(ADAM, "num_sequences")

        await step(0)
        await trainer.save(str(tmp_path / "saved"))
        await step(1)
        went_on = await digests(trainer, tmp_path / "a")
        await trainer.forward_backward([row(5)], CROSS_ENTROPY)  # what load must drop
        assert await trainer.load(str(tmp_path / "saved")) == 1
        await step(1)
        assert await digests(trainer, tmp_path / "b") == went_on

    async def test_exports_are_deltas_against_what_was_published(self, trainer: Trainer, store: WeightStore) -> None:
        anchor = await trainer.export("delta")
        assert (anchor.kind, anchor.version) == ("anchor", 0)
        assert (await trainer.export("anchor")).digest == anchor.digest
        assert len(await store.get(anchor.payload)) == anchor.payload_bytes
        await trainer.published(0)
        await trainer.published(0)
        await trainer.forward_backward([row(0)], CROSS_ENTROPY)
        await trainer.optim_step(ADAM, "num_loss_tokens")
        delta = await trainer.export("delta")
        assert (delta.kind, delta.version, delta.base_version) == ("delta", 1, 0)
        assert delta.digest != anchor.digest
        assert len(await store.get(delta.payload)) == delta.payload_bytes

    async def test_publishing_what_was_not_exported_is_refused(self, trainer: Trainer) -> None:
        with pytest.raises(WeightsError, match="version 7"):
            await trainer.published(7)

    async def test_bad_calls_are_refused_and_change_nothing(self, trainer: Trainer, tmp_path: Path) -> None:
        before = await digests(trainer, tmp_path / "a")
        with pytest.raises(ConfigError, match="no_such_loss"):
            await trainer.forward_backward([row(0)], LossSpec("no_such_loss"))
        strange = Datum(np.array([VOCAB + 5]), {"target_tokens": np.array([3]), "weights": np.ones(1, np.float32)})
        with pytest.raises(UserError):
            await trainer.forward_backward([strange], CROSS_ENTROPY)
        with pytest.raises(UserError, match="no forward_backward"):
            await trainer.optim_step(ADAM, "num_loss_tokens")
        with pytest.raises(StorageError, match="not empty"):
            await trainer.save(str(tmp_path / "a"))
        with pytest.raises(StorageError):
            await trainer.load(str(tmp_path / "nowhere"))
        assert await digests(trainer, tmp_path / "b") == before

    async def test_the_model_is_left_as_a_directory(self, trainer: Trainer, tmp_path: Path) -> None:
        await trainer.save_pretrained(str(tmp_path / "model"))
        names = {path.name for path in (tmp_path / "model").iterdir()}
        assert {"config.json", "tokenizer.json"} <= names
        assert any(name.endswith(".safetensors") for name in names)
