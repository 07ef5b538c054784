"""DPO and ORPO on a tiny model in this process: they learn, resume to the same bits, and leave nothing running."""

import asyncio
import json
import math
from pathlib import Path

import numpy as np
import pytest
from recipe_builders import metrics_of, weights_of

from rlorch.data import DataSpec
from rlorch.errors import DataError, ResumeError
from rlorch.journal.journal import LOCK_NAME
from rlorch.journal.lock import RunLock
from rlorch.local import LocalRuntime
from rlorch.observe.metrics import check
from rlorch.observe.report import write_report
from rlorch.recipes import dpo, orpo
from rlorch.recipes.pairs import read_pairs
from rlorch.recipes.reference_cache import FILE
from rlorch.recipes.sections import HeldOutSpec
from rlorch.render.prompt import RenderSpec

pytestmark = pytest.mark.engine

RATE = {"learning_rate": 1e-3, "schedule": {"kind": "linear", "warmup_steps": 2}}


def pair_rows(count=12):
    """Answers in capitals are preferred."""
    words = ["sun", "moon", "tree", "leaf", "rock", "sand"]
    prompts = [f"{index}: {words[index % 6]} ?" for index in range(count)]
    return [{"prompt": p, "chosen": p[-6:-2].upper(), "rejected": p[-6:-2].lower()} for p in prompts]


class Watched(LocalRuntime):
    """A local runtime that writes down which roles were started and released."""

    def __init__(self, spec, stop, stop_after):
        super().__init__(spec)
        self.events = []
        self._stop, self._stop_after = stop, stop_after

    async def reference(self):
        self.events.append("reference")
        return await super().reference()

    async def trainer(self):
        self.events.append("trainer")
        trainer = await super().trainer()
        return StoppingTrainer(trainer, self._stop_after, self._stop) if self._stop_after else trainer

    async def release(self, name):
        if name in self._roles:
            self.events.append(f"release {name}")
        await super().release(name)


class StoppingTrainer:
    """A trainer that sets `stop`, as Ctrl-C does, when it has made so many steps."""

    def __init__(self, trainer, steps, stop):
        self._trainer, self._steps, self._stop = trainer, steps, stop

    def __getattr__(self, name):
        return getattr(self._trainer, name)

    async def optim_step(self, adam, normalization):
        result = await self._trainer.optim_step(adam, normalization)
        if result.version == self._steps:
            self._stop.set()
        return result


async def train(recipe, config, *, stop=None, stop_after=None, **options):
    runtime = Watched(recipe.runtime_spec(config), stop, stop_after)
    try:
        return await recipe.run(config, runtime, stop=stop, **options), runtime.events
    finally:
        await runtime.stop()


async def test_dpo_widens_the_margin_until_every_pair_is_right(small_config):
    config = dpo.Config(
        **small_config(pair_rows(), steps=25, batch_size=4, optimizer=RATE, held_out={"num_prompts": 3})
    )
    last, events = await train(dpo, config)
    rows = metrics_of(Path(config.run_dir))
    assert rows[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-4), "the policy starts as the reference"
    assert abs(rows[0]["loss/margin"]) < 1e-4
    assert last["train/loss"] < 0.3
    assert last["loss/margin"] > 1.0
    assert last["loss/accuracy"] == 1.0
    assert last["loss/chosen_reward"] > 0 > last["loss/rejected_reward"]
    assert last["eval/accuracy"] == 1.0
    assert last["eval/margin"] > 0.5
    assert (Path(config.run_dir) / "model" / "config.json").is_file()
    assert events == ["reference", "release reference", "trainer"], "the reference ends before the trainer starts"
    for name in last:
        check(name)


async def test_a_resumed_dpo_run_has_the_bits_of_an_uninterrupted_one_and_starts_no_reference(small_config, tmp_path):
    fields = small_config(pair_rows(), batch_size=3, optimizer={"learning_rate": 1e-3}, checkpoint={"every": 2})
    whole = dpo.Config(**fields | {"run_dir": str(tmp_path / "whole")}, steps=7)
    await train(dpo, whole)
    first = dpo.Config(**fields, steps=4)
    await train(dpo, first)
    _, events = await train(dpo, dpo.Config(**fields, steps=7), resume=True)
    assert events == ["trainer"]
    assert weights_of(tmp_path / "run", 7) == weights_of(tmp_path / "whole", 7)
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == list(range(1, 8))


async def test_a_reference_cache_that_is_damaged_or_of_other_rows_is_computed_again(small_config, tmp_path):
    fields = small_config(pair_rows(4), batch_size=2, optimizer={"learning_rate": 1e-4})
    await train(dpo, dpo.Config(**fields, steps=1))
    cache = tmp_path / "run" / FILE
    right = np.load(cache)["sums"]
    cache.write_bytes(cache.read_bytes()[:100])
    _, events = await train(dpo, dpo.Config(**fields, steps=2), resume=True)
    assert events[0] == "reference"
    assert np.load(cache)["sums"].tolist() == right.tolist()
    other = small_config([*pair_rows(4)[:-1], {"prompt": "x", "chosen": "y", "rejected": "z"}])
    _, events = await train(dpo, dpo.Config(**fields | {"data": other["data"]}, steps=3), resume=True)
    assert events[0] == "reference"
    assert np.load(cache)["sums"].tolist()[:6] == pytest.approx(right.tolist()[:6], rel=1e-5)


async def test_a_stop_before_the_reference_is_done_leaves_a_run_to_go_on_with(small_config, tmp_path):
    config = dpo.Config(**small_config(pair_rows(4), batch_size=2, steps=1))
    stop = asyncio.Event()
    stop.set()
    last, events = await train(dpo, config, stop=stop)
    assert (last, events) == ({}, ["reference"])
    assert write_report(tmp_path / "run").is_file()
    last, events = await train(dpo, config, resume=True)
    assert (last["train/version"], events) == (1.0, ["reference", "release reference", "trainer"])


@pytest.mark.parametrize("recipe", [dpo, orpo])
async def test_a_run_asked_to_stop_ends_with_a_checkpoint_to_go_on_from(recipe, small_config, tmp_path):
    config = recipe.Config(**small_config(pair_rows(), batch_size=2, steps=1000))
    stop = asyncio.Event()
    await train(recipe, config, stop=stop, stop_after=2)
    assert stop.is_set()
    assert len(metrics_of(tmp_path / "run")) == 2
    assert weights_of(tmp_path / "run", 2)
    assert not (tmp_path / "run" / "model").exists()


async def test_orpo_lowers_its_loss_and_prefers_the_chosen_answers(small_config):
    config = orpo.Config(
        **small_config(pair_rows(), steps=25, batch_size=4, optimizer=RATE, held_out={"num_prompts": 3})
    )
    last, events = await train(orpo, config)
    rows = metrics_of(Path(config.run_dir))
    assert last["train/loss"] < 0.5 * rows[0]["train/loss"]
    assert last["loss/nll"] < 0.5 * rows[0]["loss/nll"]
    assert last["loss/margin"] > rows[0]["loss/margin"] + 1
    assert last["loss/accuracy"] == 1.0
    assert last["eval/accuracy"] == 1.0
    assert events == ["trainer"]
    for name in last:
        check(name)


async def test_conversations_train_only_their_last_answer(small_config):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    row = {"prompt": turns, "chosen": "dd", "rejected": [{"role": "assistant", "content": "eee"}]}
    config = dpo.Config(**small_config([row], steps=1, batch_size=1))
    last, _ = await train(dpo, config)
    assert last["train/num_loss_tokens"] == 3 + 4, "each answer and its EOS"


@pytest.mark.parametrize("recipe", [dpo, orpo])
def test_rows_without_any_preference_are_refused_before_anything_starts(recipe, small_config):
    config = recipe.Config(**small_config([{"prompt": "a", "chosen": "b", "rejected": "b"}], steps=1))
    with pytest.raises(DataError, match="no row prefers an answer"):
        recipe.prepare(config)
    config = recipe.Config(**small_config([{"prompt": "a", "completion": "b"}], steps=1))
    with pytest.raises(DataError, match=r"rows.jsonl row 1: no preference"):
        recipe.prepare(config)


def test_two_drivers_do_not_train_in_one_run_directory(small_config):
    config = orpo.Config(**small_config(pair_rows(), steps=1, batch_size=2, optimizer={"learning_rate": 1e-3}))
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True)
    other = RunLock(run_dir / LOCK_NAME)
    with pytest.raises(ResumeError, match="is being written by pid"):
        asyncio.run(train(orpo, config))
    other.release()
    asyncio.run(train(orpo, config))


def test_both_answers_of_a_pair_see_the_rows_tools(tmp_path):
    tools = [{"type": "function", "function": {"name": "clock", "description": "the time", "parameters": {}}}]
    messages = {
        "chosen": [{"role": "assistant", "content": "now"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    row = {"prompt": [{"role": "user", "content": "when?"}], **messages, "tools": tools}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    data = DataSpec(source=str(tmp_path / "rows.jsonl"))
    (read,) = read_pairs(data, HeldOutSpec(num_prompts=0), RenderSpec(chat=True)).train_rows
    assert read["tools"] == tools
