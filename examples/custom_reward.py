"""A reward of your own: a function from a rollout to a number, marked with @reward.

Use it in any config or on the command line:

    rlorch train config.yaml rewards.terms.0.plugin=examples/custom_reward.py

A rollout has `prompt.text`, `completion` (text), `row` (the dataset row), `finish_reason` ("stop" or "length") and
`turns` (tokens and log-probabilities). Return a bool, int or float. It runs in its own process: if it raises, hangs
or crashes, that rollout has no score, and the run goes on.
"""

from rlorch.scoring import Rollout, reward


@reward
def contains_answer(rollout: Rollout) -> float:
    """1 for naming the answer and stopping there, 0.5 for naming it somewhere in a longer text, else 0."""
    said, answer = rollout.completion.strip(), rollout.row["answer"]
    return 1.0 if said == answer else 0.5 if answer in said else 0.0
