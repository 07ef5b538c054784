"""The scalars of one optimizer step, by the names documented in `rlorch.observe.metrics`. Pure."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rlorch.coordinator.algorithm import Algorithm
from rlorch.types import Batch, ForwardResult, Group, Manifest, Rollout, StepResult


def step_metrics(
    batch: Batch,
    algorithm: Algorithm,
    *,
    dropped: Sequence[Group],
    forward: ForwardResult,
    result: StepResult,
    manifest: Manifest | None,
) -> dict[str, float]:
    """Everything that is known about a step once it is done, except times."""
    judged = [algorithm.judge(group) for group in batch.groups]
    trained = [group.rollouts[i] for group, kept in zip(batch.groups, judged, strict=True) for i in kept.kept]
    values = {"train/version": float(result.version), "train/num_sequences": float(len(trained))}
    values |= _rewards(np.concatenate([kept.scores_G for kept in judged]), batch, dropped)
    values |= _lengths(trained)
    values |= _staleness(batch, trained)
    values |= _training(forward, result)
    if manifest is not None:
        elements = max(sum(_size(entry.shape) for entry in manifest.tensors), 1)
        values |= {
            "perf/delta_bytes": float(manifest.payload_bytes),
            "perf/full_bytes": float(manifest.full_bytes),
            "perf/delta_ratio": manifest.payload_bytes / max(manifest.full_bytes, 1),
            "perf/changed_fraction": manifest.changed / elements,
        }
    return values


def _size(shape: Sequence[int]) -> int:
    return int(np.prod(shape)) if shape else 1


def _rewards(scores: NDArray[np.float64], batch: Batch, dropped: Sequence[Group]) -> dict[str, float]:
    """`reward_mean` is over trained groups; `reward_raw_mean` also over those dropped since the last step, and is
    the one to watch: filtering moves the first towards the middle."""
    verdicts = [r.verdict for group in (*batch.groups, *dropped) for r in group.rollouts if r.verdict is not None]
    raw = [verdict.score for verdict in verdicts if verdict.score is not None]
    failed = [verdict.failure for verdict in verdicts if verdict.failure is not None]
    num_groups = len(batch.groups) + len(dropped)
    values = {
        "rollout/reward_mean": float(scores.mean()),
        "rollout/reward_std": float(scores.std()),
        "rollout/reward_raw_mean": float(np.mean(raw)) if raw else 0.0,
        "rollout/groups_degenerate_fraction": len(dropped) / num_groups,
        "rollout/failures": float(len(failed)),
    }
    values |= {f"rollout/{kind}_failures": float(failed.count(kind)) for kind in set(failed)}
    parts: dict[str, list[float]] = {}
    for verdict in verdicts:
        for name, value in verdict.parts.items():
            parts.setdefault(name, []).append(value)
    return values | {f"reward/{name}": float(np.mean(scored)) for name, scored in parts.items()}


def _lengths(trained: Sequence[Rollout]) -> dict[str, float]:
    tokens = np.array([rollout.num_sampled_tokens for rollout in trained])
    return {
        "rollout/completion_tokens_mean": float(tokens.mean()),
        "rollout/completion_tokens_max": float(tokens.max()),
        "rollout/truncated_fraction": float(np.mean([rollout.finish_reason == "length" for rollout in trained])),
    }


def _staleness(batch: Batch, trained: Sequence[Rollout]) -> dict[str, float]:
    """Staleness of a rollout: trainer version at use minus the oldest version that sampled any of its tokens."""
    lags = np.array([batch.step - rollout.oldest_version for rollout in trained])
    spans = [len(turn.completion.spans) for rollout in trained for turn in rollout.turns]
    values = {
        "async/staleness_mean": float(lags.mean()),
        "async/staleness_max": float(lags.max()),
        "async/version_spans_mean": float(np.mean(spans)),
    }
    return values | {f"async/staleness_{lag}": float((lags == lag).mean()) for lag in np.unique(lags)}


def _training(forward: ForwardResult, result: StepResult) -> dict[str, float]:
    """Trainer metrics under train/: sums per loss token, everything else as it is."""
    sums = {name.partition(":")[0]: value for name, value in forward.metrics.items() if name.endswith(":sum")}
    weight = max(sums.pop("num_loss_tokens", 1.0), 1e-12)
    values = {f"train/{name}": value / weight for name, value in sums.items()}
    values["train/num_loss_tokens"] = weight
    for name, value in (*forward.metrics.items(), *result.metrics.items()):
        stem, _, reduction = name.partition(":")
        if reduction != "sum":
            values[f"train/{stem}_{reduction}" if reduction in ("max", "min") else f"train/{stem}"] = value
    return values
