"""Random programs over the models of one host: each model ends as if it had been there alone."""

import random

import pytest
from lora_builders import ADAM, TIS
from trainer_builders import rows, tiny_model

from rlorch.engine.host import TrainerHostEngine
from rlorch.errors import UserError
from rlorch.specs import HostSpec, LoraSpec, ModelSpec, TrainerSpec

pytestmark = pytest.mark.engine

BASE = ModelSpec(name="base", base_only=True)
ADAPTERS = (
    ModelSpec(name="a", lora=LoraSpec(rank=2)),
    ModelSpec(name="b", lora=LoraSpec(rank=8, seed=3, train_unembed=False)),
    ModelSpec(name="c", lora=LoraSpec(rank=4, alpha=4, train_attn=False, train_mlp=False)),
)
NUM_CALLS = 35
PROBE = rows(100, [9, 5])


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_model(tmp_path_factory)


def start(directory, tmp_path):
    spec = TrainerSpec(threads=1, micro_batch_tokens=16)
    return TrainerHostEngine(HostSpec(model=directory, job_dir=str(tmp_path / "job"), trainer=spec))


def apply(host, spec, action, argument):
    """One call on one model; what it returned, as plain values."""
    name = spec.name
    if action == "gradient":
        return [values.tolist() for values in host.forward_backward(name, rows(argument, [7, 12]), TIS).logprobs]
    if action == "step":
        try:
            return host.optim_step(name, ADAM, "num_loss_tokens")
        except UserError as error:
            return str(error)
    if action == "score":
        return [values.tolist() for values in host.forward(name, PROBE).logprobs]
    if action == "open":
        return host.open(spec)
    return host.load(name, action, argument)


@pytest.mark.parametrize("seed", range(3))
def test_every_model_ends_as_if_it_had_been_alone(directory, tmp_path, seed):
    draw = random.Random(seed)
    host = start(directory, tmp_path)
    histories, saved = {}, {spec.name: [] for spec in ADAPTERS}
    base = None
    for number in range(NUM_CALLS):
        spec = draw.choice(ADAPTERS)
        history = histories.setdefault(spec.name, [])
        if not history:
            history.append(("open", None, apply(host, spec, "open", None)))
        action = draw.choices(
            ("gradient", "step", "score", "open", "save", "state", "weights", "adapter", "close", "base"),
            (8, 5, 2, 1, 2, 1, 1, 1, 1, 2),
        )[0]
        argument = number
        if action == "base":
            host.open(BASE)
            scored = [values.tolist() for values in host.forward("base", PROBE).logprobs]
            assert base in (None, scored)
            base = scored
        elif action == "close":
            host.close_model(spec.name)
            del histories[spec.name]
        elif action == "save":
            host.save(spec.name, "state", str(tmp_path / f"{number}-state"))
            host.save(spec.name, "adapter", str(tmp_path / f"{number}-adapter"))
            saved[spec.name].append(number)
        else:
            if action in ("state", "weights", "adapter"):
                if not saved[spec.name]:
                    continue
                kind = "adapter" if action == "adapter" else "state"
                argument = str(tmp_path / f"{draw.choice(saved[spec.name])}-{kind}")
            history.append((action, argument, apply(host, spec, action, argument)))
    assert histories
    for spec in ADAPTERS:
        alone = start(directory, tmp_path)
        for action, argument, returned in histories.get(spec.name, ()):
            assert apply(alone, spec, action, argument) == returned
        if spec.name in histories:
            assert apply(alone, spec, "score", None) == apply(host, spec, "score", None)
