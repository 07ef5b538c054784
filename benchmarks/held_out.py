"""Held-out accuracy of a transformers model, sampled at temperature 1: the same code on both sides of `vs_trl`.

Imports nothing of rlorch, so that the peer's environment can run it too.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

TASK = "spell_backward"
THRESHOLD = 0.999


def is_right(row: dict[str, Any], text: str, ended: bool) -> bool:
    """Whether a completion that ended by itself is the answer: the quickstart's reward."""
    return ended and _scorer()(answer=text.strip(), entry=row) >= THRESHOLD


@cache
def _scorer() -> Any:
    """The task's scorer; making one takes 20 ms."""
    from reasoning_gym import get_score_answer_fn

    return get_score_answer_fn(TASK)


def sampled_accuracy(
    model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], *, suffix: str, max_tokens: int, samples: int, seed: int
) -> float:
    """Share of right answers over `samples` completions of each row's question. The generator state is kept."""
    import torch

    batch = tokenizer(
        [row["question"] + suffix for row in rows], return_tensors="pt", padding=True, padding_side="left"
    )
    batch.pop("token_type_ids", None)
    eos, training, right = tokenizer.eos_token_id, model.training, 0
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model.eval()
        for _ in range(samples):
            tokens_BT = model.generate(
                **batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max_tokens, use_cache=True
            )[:, batch["input_ids"].shape[1] :].tolist()
            for row, tokens in zip(rows, tokens_BT, strict=True):
                ended = eos in tokens
                answer = tokens[: tokens.index(eos)] if ended else tokens
                right += is_right(row, tokenizer.decode(answer, skip_special_tokens=True), ended)
        model.train(training)
    return right / (samples * len(rows))
