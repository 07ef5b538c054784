import logging

import numpy as np
import pytest
from lora_builders import ADAM, TIS
from trainer_builders import rows, tiny_model

from rlorch.engine.host import TrainerHostEngine
from rlorch.errors import ConfigError, ModelError, StorageError, UserError
from rlorch.specs import HostSpec, LoraSpec, ModelSpec, TrainerSpec

pytestmark = pytest.mark.engine

DATUMS = rows(1, [14, 9])
FULL = ModelSpec(name="full")
BASE = ModelSpec(name="base", base_only=True)
A = ModelSpec(name="a", lora=LoraSpec(rank=4))
B = ModelSpec(name="b", lora=LoraSpec(rank=8, seed=3, train_unembed=False))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_model(tmp_path_factory)


@pytest.fixture
def host(directory, tmp_path):
    return make_host(directory, tmp_path)


def make_host(directory, tmp_path, trainer=None, **options):
    trainer = trainer or TrainerSpec(threads=1)
    return TrainerHostEngine(HostSpec(model=directory, job_dir=str(tmp_path / "job"), trainer=trainer, **options))


def step(host, name, datums=DATUMS):
    host.forward_backward(name, datums, TIS)
    return host.optim_step(name, ADAM, "num_loss_tokens").version


def same(a, b):
    return all((x == y).all() for x, y in zip(a.logprobs, b.logprobs, strict=True))


# --- opening ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [(FULL, A), (FULL, BASE), (A, FULL), (BASE, FULL)])
def test_all_weights_and_adapters_do_not_go_on_one_host(host, first, second):
    host.open(first)
    with pytest.raises(UserError, match="start another host"):
        host.open(second)
    assert host.forward(first.name, DATUMS).logprobs


def test_there_is_one_full_model(host):
    host.open(FULL)
    with pytest.raises(UserError, match="already has 'full'"):
        host.open(ModelSpec(name="other"))


def test_opening_again_keeps_everything_but_the_gradient(host, caplog):
    for spec in (A, B):
        host.open(spec)
        step(host, spec.name)
    before = host.forward("a", DATUMS)
    with caplog.at_level(logging.WARNING):
        assert host.open(A) == 1
    assert not [record for record in caplog.records if record.name.startswith("rlorch")]
    host.forward_backward("a", DATUMS, TIS)
    host.forward_backward("b", DATUMS, TIS)
    with caplog.at_level(logging.WARNING):
        assert host.open(A) == 1
    assert "the gradient of 1 forward_backward calls" in caplog.text
    assert same(host.forward("a", DATUMS), before)
    with pytest.raises(UserError, match="no forward_backward"):
        host.optim_step("a", ADAM, "none")
    assert host.optim_step("b", ADAM, "none").version == 2
    assert step(host, "a") == 2


def test_a_full_model_stays_when_it_is_closed_and_goes_on_when_it_is_opened(host):
    host.open(FULL)
    step(host, "full")
    before = host.forward("full", DATUMS)
    host.forward_backward("full", DATUMS, TIS)
    host.close_model("full")
    with pytest.raises(UserError, match="no model 'full' is open on this host; there is none"):
        host.forward("full", DATUMS)
    with pytest.raises(UserError, match="trains all weights"):
        host.open(BASE)
    assert host.open(ModelSpec(name="again")) == 1
    assert same(host.forward("again", DATUMS), before)
    with pytest.raises(UserError, match="no forward_backward"):
        host.optim_step("again", ADAM, "none")


def test_a_name_means_one_spec(host):
    host.open(A)
    with pytest.raises(UserError, match="model 'a' is open with another spec"):
        host.open(A.model_copy(update={"lora": LoraSpec(rank=8)}))
    with pytest.raises(UserError, match="base_only is the base without an adapter"):
        host.open(ModelSpec(name="c", lora=LoraSpec(rank=2), base_only=True))
    with pytest.raises(UserError, match="needs a name"):
        host.open(ModelSpec(name=""))


def test_a_closed_adapter_begins_anew_and_a_host_without_models_takes_any(host):
    host.open(A)
    fresh = host.forward("a", DATUMS)
    step(host, "a")
    host.close_model("a")
    host.close_model("a")
    assert host.open(A) == 0
    assert same(host.forward("a", DATUMS), fresh)
    host.close_model("a")
    assert host.open(FULL) == 0
    assert step(host, "full") == 1


def test_a_host_without_a_model_does_not_start(tmp_path):
    with pytest.raises(ModelError):
        make_host(str(tmp_path / "nowhere"), tmp_path)


def test_several_ranks_are_refused_in_one_process(directory, tmp_path):
    host = make_host(directory, tmp_path, TrainerSpec(threads=1, ranks=2))
    for spec in (FULL, A):
        with pytest.raises((ConfigError, UserError), match="ranks"):
            host.open(spec)


# --- what a model or a host does not do -------------------------------------------------------------------


def test_a_base_is_forward_alone(host, tmp_path):
    host.open(BASE)
    host.open(A)
    plain = host.forward("base", DATUMS)
    step(host, "a")
    assert same(host.forward("base", DATUMS), plain)
    for call in (
        lambda: host.forward_backward("base", DATUMS, TIS),
        lambda: host.optim_step("base", ADAM, "none"),
        lambda: host.save("base", "state", str(tmp_path / "x")),
        lambda: host.load("base", "state", str(tmp_path / "x")),
    ):
        with pytest.raises(UserError, match="frozen base"):
            call()


@pytest.mark.parametrize("spec", [FULL, A])
def test_a_forward_only_host_refuses_to_train(directory, tmp_path, spec):
    trained = make_host(directory, tmp_path)
    trained.open(spec)
    step(trained, spec.name)
    trained.save(spec.name, "state", str(tmp_path / "state"))
    host = make_host(directory, tmp_path, forward_only=True)
    host.open(spec)
    with pytest.raises(UserError, match="forward_only"):
        host.forward_backward(spec.name, DATUMS, TIS)
    with pytest.raises(UserError, match="forward_only"):
        host.optim_step(spec.name, ADAM, "none")
    assert host.load(spec.name, "state", str(tmp_path / "state")) == 1
    assert same(host.forward(spec.name, DATUMS), trained.forward(spec.name, DATUMS))


def test_a_row_longer_than_the_context_is_named_with_the_limit(directory, tmp_path):
    host = make_host(directory, tmp_path, max_context_length=10)
    host.open(A)
    for call in (lambda: host.forward("a", DATUMS[::-1]), lambda: host.forward_backward("a", DATUMS[::-1], TIS)):
        with pytest.raises(UserError, match="datum 1: 14 tokens; max_context_length of this host is 10"):
            call()
    assert len(host.forward("a", rows(2, [10])).logprobs[0]) == 10


def test_only_full_models_are_exported_and_only_adapters_saved_as_such(host, directory, tmp_path):
    host.open(A)
    for call in (lambda: host.export("a", "anchor", 0), lambda: host.published("a", 0)):
        with pytest.raises(UserError, match="does not train all weights"):
            call()
    full = make_host(directory, tmp_path)
    full.open(FULL)
    with pytest.raises(UserError, match="'full' is no adapter"):
        full.save("full", "adapter", str(tmp_path / "x"))
    with pytest.raises(UserError, match="'full' is no adapter"):
        full.load("full", "adapter", str(tmp_path / "x"))
    manifest, payload = full.export("full", "delta", 7)
    assert (manifest.kind, manifest.version, len(payload)) == ("anchor", 7, manifest.payload_bytes)
    full.published("full", 7)
    step(full, "full")
    assert full.export("full", "delta", 8)[0].base_version == 7


def test_unknown_kinds_and_likeliest_tokens_are_refused(host, tmp_path):
    host.open(A)
    with pytest.raises(UserError, match="save of 'dcp'"):
        host.save("a", "dcp", str(tmp_path / "x"))
    with pytest.raises(UserError, match="load of 'dcp'"):
        host.load("a", "dcp", str(tmp_path / "x"))
    with pytest.raises(UserError, match="top_k is -1"):
        host.forward("a", DATUMS, top_k=-1)
    assert not (tmp_path / "x").exists()


# --- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [FULL, A])
def test_weights_load_with_a_fresh_optimizer_and_states_with_their_own(directory, tmp_path, spec):
    host = make_host(directory, tmp_path)
    host.open(spec)
    for _ in range(2):
        step(host, spec.name)
    host.save(spec.name, "state", str(tmp_path / "two"))
    scored = host.forward(spec.name, DATUMS)
    step(host, spec.name)
    went_on = host.forward(spec.name, DATUMS)
    results = {}
    for what in ("state", "weights"):
        other = make_host(directory, tmp_path)
        other.open(spec)
        step(other, spec.name)
        other.forward_backward(spec.name, DATUMS, TIS)
        assert other.load(spec.name, what, str(tmp_path / "two")) == 2
        assert same(other.forward(spec.name, DATUMS), scored)
        assert step(other, spec.name) == 3
        results[what] = other.forward(spec.name, DATUMS)
    assert same(results["state"], went_on)
    assert not same(results["weights"], went_on)


def test_a_foreign_or_damaged_state_changes_nothing(host, directory, tmp_path):
    full = make_host(directory, tmp_path)
    full.open(FULL)
    full.save("full", "state", str(tmp_path / "full"))
    for spec in (A, B):
        host.open(spec)
        step(host, spec.name)
    host.save("b", "state", str(tmp_path / "b"))
    host.save("b", "adapter", str(tmp_path / "peft"))
    before = host.forward("a", DATUMS)
    for what, path in (("state", "full"), ("weights", "b"), ("adapter", "peft"), ("state", "peft"), ("adapter", "b")):
        with pytest.raises((UserError, StorageError)):
            host.load("a", what, str(tmp_path / path))
    with pytest.raises(StorageError, match="another model"):
        full.load("full", "state", str(tmp_path / "b"))
    assert same(host.forward("a", DATUMS), before)
    assert step(host, "a") == 2


def test_top_k_comes_through_the_host(host):
    host.open(A)
    result = host.forward("a", DATUMS, top_k=2)
    assert [ids.shape for ids, _ in result.top_k] == [(14, 2), (9, 2)]
    assert np.array_equal(result.logprobs[0], host.forward("a", DATUMS).logprobs[0])
