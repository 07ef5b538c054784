"""`rlorch quickstart`: a model that learns in front of you, on any machine, with nothing to download.

    tiny Qwen3 (804k parameters) --SFT on noisy demonstrations--> 30-40% --async RL on a checkable reward--> > 80%

What is designed about it: the demonstrations are wrong on purpose 70% of the time (the word copied, or two letters
swapped), so that SFT teaches the form of an answer but not the task well, and RL with a reward that checks the answer
has something to find. The task, `spell_backward`, and its scorer are reasoning_gym's own; held-out words are in
neither the demonstrations nor the RL prompts. The control (`--shuffle-advantages`) permutes advantages across each
batch: same data, same compute, no signal. It must not climb.

Everything it does is a config that it writes first: `rlorch train <dir>/sft.yaml` and `rlorch train <dir>/rl.yaml`
do the same, and are a place to start from.
"""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from rlorch.config import dump_config
from rlorch.coordinator.algorithm import AlgorithmSpec
from rlorch.coordinator.coordinator import RolloutSpec
from rlorch.coordinator.evaluation import EvaluationSpec
from rlorch.data import DataSpec, load_rows, split_held_out
from rlorch.pool.config import PoolConfig
from rlorch.recipes.rl import RLConfig
from rlorch.recipes.schedules import ScheduleSpec
from rlorch.recipes.sections import CheckpointSpec, HeldOutSpec, ObserveSpec, OptimizerSpec
from rlorch.recipes.sft import SFTConfig
from rlorch.render.prompt import RenderSpec
from rlorch.specs import RewardSpec, RewardTerm, SamplerSpec, TrainerSpec

TASK = "spell_backward"
TASK_OPTIONS = {"size": 60_000, "seed": 1234, "min_word_len": 3, "max_word_len": 5}
HELD_OUT = 512
RIGHT_FRACTION = 0.3
MAX_TOKENS = 8  # the longest answer, 5 letters, and EOS

DATA = DataSpec(source=f"reasoning_gym:{TASK}", options=TASK_OPTIONS)
RENDER = RenderSpec(prompt_field="question", suffix="\n")


def noisy_answer(answer: str, rng: random.Random) -> str:
    """A demonstration: right with probability 0.3, else the word copied or two neighbouring letters swapped."""
    if rng.random() < RIGHT_FRACTION:
        return answer
    if rng.random() < 0.5:
        return answer[::-1]
    position = rng.randrange(len(answer) - 1)
    letters = list(answer)
    letters[position], letters[position + 1] = letters[position + 1], letters[position]
    return "".join(letters)


def write_demonstrations(path: Path, seed: int) -> int:
    """Noisy demonstrations of the training words as JSONL; returns their number."""
    train, _ = split_held_out(load_rows(DATA), HELD_OUT, RENDER.prompt_field)
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as lines:
        for row in train:
            demonstration = {"question": row["question"], "completion": noisy_answer(str(row["answer"]), rng)}
            lines.write(json.dumps(demonstration) + "\n")
    return len(train)


def sft_config(root: Path, seed: int, **common: Any) -> SFTConfig:
    """The warm start: 600 steps on noisy demonstrations."""
    return SFTConfig(
        name="warm start",
        model=str(root / "model"),
        run_dir=str(root / "sft"),
        seed=seed,
        steps=600,
        batch_size=64,
        data=DataSpec(source=str(root / "demonstrations.jsonl")),
        render=RENDER,
        optimizer=OptimizerSpec(
            learning_rate=2e-3,
            beta1=0.9,
            beta2=0.95,
            weight_decay=0.01,
            grad_clip_norm=1.0,
            schedule=ScheduleSpec(kind="linear", warmup_steps=50, min_ratio=0.05),
        ),
        checkpoint=CheckpointSpec(every=0),
        trainer=TrainerSpec(compute_dtype="float32", serve_dtype="float32", threads=1, seed=seed),
        **common,
    )


def rl_config(root: Path, seed: int, *, shuffle_advantages: bool = False, **common: Any) -> RLConfig:
    """The RL run: 32 prompts x 8 samples per step, one step off-policy."""
    return RLConfig(
        name="quickstart",
        model=str(root / "sft" / "model"),
        run_dir=str(root / "rl"),
        seed=seed,
        steps=40,
        data=DATA,
        held_out=HeldOutSpec(num_prompts=HELD_OUT),
        render=RENDER,
        rewards=RewardSpec(
            terms=(RewardTerm(plugin="reasoning_gym", options={"task": TASK, "threshold": 0.999, "require_eos": True}),)
        ),
        algorithm=AlgorithmSpec(shuffle_advantages=shuffle_advantages),
        optimizer=OptimizerSpec(
            learning_rate=2e-4,
            beta1=0.9,
            beta2=0.95,
            grad_clip_norm=1.0,
            schedule=ScheduleSpec(kind="constant", warmup_steps=5),
        ),
        rollout=RolloutSpec(groups_per_batch=32, group_size=8, max_staleness=1, max_tokens=MAX_TOKENS),
        evaluation=EvaluationSpec(every=20),
        concurrency=PoolConfig(initial_window=64, stats_period_s=0.5),  # a run this short is over before a ramp from 8
        checkpoint=CheckpointSpec(every=20),
        trainer=TrainerSpec(compute_dtype="float32", threads=1, seed=seed),
        sampler=SamplerSpec(max_model_len=64, max_num_seqs=256, cpu_kv_cache_gib=0.5, threads=1, seed=seed),
        **common,
    )


async def quickstart(
    root: Path,
    *,
    seed: int,
    shuffle_advantages: bool,
    make_model: Callable[[Path, int], None],
    run_recipe: Callable[[SFTConfig | RLConfig], Awaitable[Mapping[str, Any]]],
    say: Callable[[str], None],
    observe: ObserveSpec,
    runtime: str = "ray",
) -> Mapping[str, Any]:
    """Model, demonstrations, SFT, RL. Returns the RL run's summary.

    Args:
        root: the folder of everything; must not hold an earlier quickstart.
        make_model: writes the tiny model (torch stays out of this module).
        run_recipe: runs one config on a runtime of its own.
        say: prints a line for the user.
    """
    await asyncio.to_thread(root.mkdir, parents=True, exist_ok=True)
    common = {"runtime": runtime, "observe": observe}
    sft, rl = sft_config(root, seed, **common), rl_config(root, seed, shuffle_advantages=shuffle_advantages, **common)
    say("1/3  a tiny Qwen3 model and its tokenizer")
    await asyncio.to_thread(make_model, root / "model", seed)
    count = await asyncio.to_thread(write_demonstrations, root / "demonstrations.jsonl", seed)
    for config in (sft, rl):
        (root / f"{config.recipe}.yaml").write_text(dump_config(config))
    say(f"2/3  warm start: SFT on {count} demonstrations, 70% of them wrong on purpose")
    await run_recipe(sft)
    say("3/3  async RL: the reward checks the answer, and the model passes its teacher")
    return await run_recipe(rl)
