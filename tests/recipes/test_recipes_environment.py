"""RL in an environment of the user's own, reached from the config: several turns, its rewards, no reward workers."""

from pathlib import Path

import pytest

from rlorch.errors import PluginError
from rlorch.journal.recovery import iter_batches, read_state
from rlorch.local import LocalRuntime
from rlorch.recipes import rl
from rlorch.rollout import EnvironmentSpec, load_environment
from rlorch.weights.manifest import digest

pytestmark = pytest.mark.engine

ENVIRONMENT = '''
from rlorch.rollout import Observation

class Chatter:
    """Rewards variety, says one letter back, and ends after some turns."""

    def __init__(self, turns=2):
        self.turns = turns

    async def reset(self, row):
        return Observation(text="?")

    async def step(self, completion, rollout):
        self.turns -= 1
        reward = len(set(completion)) / 8
        return Observation(text="!", done=self.turns == 0, reward=reward)

    async def close(self):
        pass
'''
STOP = [chr(code) for code in range(48, 123)]  # nearly every character ends a turn


@pytest.fixture
def environment(tmp_path):
    path = tmp_path / "chatter.py"
    path.write_text(ENVIRONMENT)
    return path


def config(small_config, environment, /, **sections):
    fields = small_config(
        [{"prompt": f"{index}:"} for index in range(20)],
        steps=2,
        environment={"plugin": str(environment), "options": {"turns": 3}, "limits": {"max_context_tokens": 64}},
        algorithm={"drop_equal_rewards": False},
        rollout={"groups_per_batch": 2, "group_size": 3, "max_tokens": 6, "stop": STOP},
        evaluation={"every": 0},
        sampler={"engine": "transformers", "max_model_len": 64, "threads": 1},
    )
    return rl.Config(**fields | sections)


async def test_a_run_trains_on_whole_episodes_with_the_environments_own_rewards(small_config, environment, tmp_path):
    settings = config(small_config, environment)
    assert "reward" not in rl.runtime_spec(settings).roles
    runtime = LocalRuntime(rl.runtime_spec(settings))
    try:
        summary = await rl.run(settings, runtime)
    finally:
        await runtime.stop()
    assert (summary.status, summary.version) == ("finished", 2)
    rollouts = [
        r for batch in iter_batches(tmp_path / "run" / "journal.sqlite") for g in batch.groups for r in g.rollouts
    ]
    assert len(rollouts) == 2 * 2 * 3
    assert max(len(rollout.turns) for rollout in rollouts) == 3
    for rollout in rollouts:
        assert rollout.verdict.score == pytest.approx(sum(rollout.verdict.parts.values()))
        assert set(rollout.verdict.parts) == {f"turn_{number}" for number in range(len(rollout.turns))}


def test_the_only_environment_of_a_file_need_not_be_named_and_its_options_are_checked(environment):
    made = load_environment(EnvironmentSpec(plugin=str(environment), options={"turns": 5}))()
    assert made.turns == 5
    example = Path(__file__).parents[2] / "examples" / "guess_number.py"
    assert type(load_environment(EnvironmentSpec(plugin=str(example)))()).__name__ == "GuessNumber"
    with pytest.raises(PluginError, match=r"options \['rounds'\] do not fit"):
        load_environment(EnvironmentSpec(plugin=str(environment), options={"rounds": 5}))
    with pytest.raises(PluginError, match="there is no file"):
        load_environment(EnvironmentSpec(plugin="nowhere.py"))
    with pytest.raises(PluginError, match=r"nor an entry point of group 'rlorch.environments'"):
        load_environment(EnvironmentSpec(plugin="chess"))


def test_a_run_that_nothing_scores_or_whose_episodes_do_not_fit_is_refused(small_config, environment):
    with pytest.raises(ValueError, match="nothing scores a rollout"):
        config(small_config, environment, environment=None)
    limits = {"plugin": str(environment), "limits": {"max_context_tokens": 65}}
    with pytest.raises(ValueError, match=r"max_context_tokens is 65, but sampler.max_model_len only 64"):
        config(small_config, environment, environment=limits)


async def test_an_evaluation_names_its_weights_and_keeps_its_prompts(small_config, environment, tmp_path):
    settings = config(small_config, environment, held_out={"num_prompts": 3})
    runtime = LocalRuntime(rl.runtime_spec(settings))
    try:
        await rl.run(settings, runtime)
    finally:
        await runtime.stop()
    run = tmp_path / "run"
    kept = (run / "held_out.jsonl").read_bytes()
    assert len(kept.splitlines()) == 3
    events = read_state(run / "journal.sqlite").last_events
    before, after = events["evaluation_before"].payload, events["evaluation_after"].payload
    assert before["prompts_digest"] == after["prompts_digest"] == digest(kept)
    assert before["weights_digest"] != after["weights_digest"] == events["checkpoint"].payload["digest"] != ""
