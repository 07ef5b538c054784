"""TRL's GRPOTrainer on the work that `vs_trl` describes; runs in the peer's own environment and prints one JSON line.

    .venv-trl/bin/python benchmarks/trl_peer.py work.json

The clock runs from the start of training and stands still during evaluations. A step is TRL's `on_step_begin` to
`on_step_end`; generation and rewards are timed around TRL's own methods, and training is what is left: batch
preparation, log-probs, loss, backward, optimizer.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")
WORK = json.loads(Path(sys.argv[1]).read_text())
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(WORK["threads"])

import torch  # noqa: E402 - after the thread variables
from datasets import Dataset, disable_progress_bars  # noqa: E402
from held_out import is_right, sampled_accuracy  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

ROW = ("question", "answer", "metadata")
"""What the scorer reads of a row."""


class TimedTrainer(GRPOTrainer):
    """TRL's trainer with two stop-watches."""

    generation_s = 0.0
    reward_s = 0.0

    def _generate(self, *args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = super()._generate(*args, **options)
        self.generation_s += time.perf_counter() - start
        return result

    def _calculate_rewards(self, *args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = super()._calculate_rewards(*args, **options)
        self.reward_s += time.perf_counter() - start
        return result


class Clock(TrainerCallback):
    """Step times, and held-out accuracy every `eval_every` steps outside the timed part."""

    def __init__(self, held_out: list[dict[str, Any]]) -> None:
        self.held_out = held_out
        self.trainer: Any = None
        self.steps: list[dict[str, float]] = []
        self.curve: list[dict[str, float]] = []
        self.clock_s = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.resumed = time.perf_counter()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()
        self.before = self.trainer.generation_s, self.trainer.reward_s

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.perf_counter()
        self.clock_s += now - self.resumed
        step = {"step_s": now - self.began}
        step["generation_s"] = self.trainer.generation_s - self.before[0]
        step["reward_s"] = self.trainer.reward_s - self.before[1]
        self.steps.append(step)
        if state.global_step % WORK["eval_every"] == 0:
            accuracy = sampled_accuracy(
                self.trainer.model,
                self.trainer.processing_class,
                self.held_out,
                suffix=WORK["suffix"],
                max_tokens=WORK["max_tokens"],
                samples=WORK["eval_samples"],
                seed=state.global_step,
            )
            self.curve.append({"step": state.global_step, "clock_s": self.clock_s, "accuracy": accuracy})
            if accuracy >= WORK["target"] and state.global_step >= WORK["min_steps"]:
                control.should_training_stop = True
        self.resumed = time.perf_counter()


def reward(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """1 for a right answer that ended by itself, as in the quickstart."""
    rows = [
        {key: json.loads(value) for key, value in zip(ROW, values, strict=True)}
        for values in zip(*(columns[key] for key in ROW), strict=True)
    ]
    return [
        float(is_right(row, text, WORK["eos"] in ids))
        for row, text, ids in zip(rows, completions, completion_ids, strict=True)
    ]


def main() -> None:
    disable_progress_bars()
    torch.set_num_threads(WORK["threads"])
    rows = [json.loads(line) for line in Path(WORK["rows"]).read_text().splitlines()]
    rows = [rows[index] for index in WORK["order"]]
    held_out = [json.loads(line) for line in Path(WORK["held_out"]).read_text().splitlines()]
    dataset = Dataset.from_list(
        [{"prompt": row["question"] + WORK["suffix"], **{key: json.dumps(row[key]) for key in ROW}} for row in rows]
    )
    groups, group_size, optimizer = WORK["groups_per_batch"], WORK["group_size"], WORK["optimizer"]
    args = GRPOConfig(
        output_dir=WORK["output_dir"],
        max_steps=WORK["steps"],
        per_device_train_batch_size=groups * group_size,
        gradient_accumulation_steps=1,
        num_generations=group_size,
        max_completion_length=WORK["max_tokens"],
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        loss_type="dapo",
        scale_rewards="group",
        shuffle_dataset=False,
        learning_rate=optimizer["learning_rate"],
        adam_beta1=optimizer["beta1"],
        adam_beta2=optimizer["beta2"],
        adam_epsilon=optimizer["eps"],
        weight_decay=optimizer["weight_decay"],
        max_grad_norm=optimizer["grad_clip_norm"],
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=optimizer["warmup_steps"],
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=WORK["seed"],
    )
    clock = Clock(held_out)
    trainer = TimedTrainer(
        model=AutoModelForCausalLM.from_pretrained(WORK["model"], dtype=torch.float32),
        reward_funcs=reward,
        args=args,
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(WORK["model"]),
        callbacks=[clock],
    )
    clock.trainer = trainer
    is_right(rows[0], "", True)  # imports and makes the scorer, which is no part of a step
    start = time.perf_counter()
    trainer.train()
    result = {
        "steps": clock.steps,
        "curve": clock.curve,
        "clock_s": clock.clock_s,
        "wall_s": time.perf_counter() - start,
        "versions": {name: __import__(name).__version__ for name in ("trl", "transformers", "torch")},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
