import os
import resource
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from trainer_builders import plain_logprobs, rows, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from rlorch.engine import files
from rlorch.engine.trainer import TorchTrainer
from rlorch.errors import StorageError, WeightsError
from rlorch.specs import TrainerSpec, WeightsSpec
from rlorch.types import AdamParams, LossSpec
from rlorch.weights.codec import apply_update, decode_update

pytestmark = pytest.mark.engine

TIS = LossSpec("importance_sampling", {"tis_cap": 2.0})


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_model(tmp_path_factory)


def trainer(directory, **spec):
    return TorchTrainer(directory, TrainerSpec(**spec), WeightsSpec())


def train(engine, steps, rate=1e-3):
    for _ in range(steps):
        engine.forward_backward(rows(engine.version, [14, 9, 5]), TIS)
        engine.optim_step(AdamParams(rate, grad_clip_norm=1.0, weight_decay=0.01), "num_loss_tokens")


def state(engine):
    live = {n: p.detach().clone() for n, p in engine._parameters.items()}
    return live | {n: t.clone() for n, t in engine._learner.adamw.tensors().items()}


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# --- checkpoints ------------------------------------------------------------------------------------------


def test_training_goes_on_bit_for_bit_from_a_checkpoint(directory, tmp_path):
    whole = trainer(directory)
    train(whole, 3)
    digests = whole.save(str(tmp_path / "three"))
    train(whole, 2)
    resumed = trainer(directory)
    train(resumed, 1)
    resumed.forward_backward(rows(99, [7]), TIS)  # accumulated, to be dropped
    assert resumed.load(str(tmp_path / "three")) == 3
    assert resumed.load(str(tmp_path / "three")) == 3
    train(resumed, 2)
    assert resumed.version == whole.version == 5
    assert same_bits(state(resumed), state(whole))
    assert sorted(digests) == sorted(os.listdir(tmp_path / "three"))
    assert digests == {name: files.file_digest(tmp_path / "three" / name) for name in digests}


def test_a_checkpoint_before_the_first_step_has_no_moments(directory, tmp_path):
    engine = trainer(directory)
    engine.save(str(tmp_path / "zero"))
    before = state(engine)
    train(engine, 2)
    assert engine.load(str(tmp_path / "zero")) == 0
    assert same_bits(state(engine), before)


def test_what_was_loaded_does_not_depend_on_the_files_any_more(directory, tmp_path):
    engine = trainer(directory)
    train(engine, 1)
    engine.save(str(tmp_path / "one"))
    engine.load(str(tmp_path / "one"))
    kept = state(engine)
    for path in (tmp_path / "one").iterdir():
        os.truncate(path, 0)
    train(engine, 1)
    assert not same_bits(state(engine), kept)


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "trainer.json"])
def test_a_damaged_or_missing_file_is_named_and_changes_nothing(directory, tmp_path, name):
    engine = trainer(directory)
    train(engine, 1)
    engine.save(str(tmp_path / "one"))
    train(engine, 1)
    before = state(engine)
    path = tmp_path / "one" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x81
    path.write_bytes(data)
    with pytest.raises(StorageError, match=rf"{name} .*damaged"):
        engine.load(str(tmp_path / "one"))
    path.unlink()
    with pytest.raises(StorageError, match=name):
        engine.load(str(tmp_path / "one"))
    assert engine.version == 2
    assert same_bits(state(engine), before)


def test_a_checkpoint_of_another_model_is_refused(directory, tmp_path):
    config = Qwen3Config.from_pretrained(directory, num_hidden_layers=2, layer_types=["full_attention"] * 2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(directory).save_pretrained(tmp_path / "small")
    trainer(str(tmp_path / "small")).save(str(tmp_path / "ck"))
    with pytest.raises(StorageError, match=r"another model: 22 tensors differ"):
        trainer(directory).load(str(tmp_path / "ck"))


def test_a_directory_that_holds_something_is_not_written_to(directory, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for write in (trainer(directory).save, trainer(directory).save_pretrained):
        with pytest.raises(StorageError, match="is not empty"):
            write(str(tmp_path))
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_a_path_that_cannot_be_created_is_named(directory, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot create .*file/checkpoint"):
        trainer(directory).save(str(tmp_path / "file" / "checkpoint"))


def test_a_full_disk_is_a_storage_error_that_names_the_file(directory, tmp_path):
    engine = trainer(directory)
    old_limit, old_handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, old_limit[1]))
    try:
        with pytest.raises(StorageError, match=r"cannot write .*full/weights\.safetensors"):
            engine.save(str(tmp_path / "full"))
        with pytest.raises(StorageError, match=r"cannot write .*pretrained/model\.safetensors"):
            engine.save_pretrained(str(tmp_path / "pretrained"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
        signal.signal(signal.SIGXFSZ, old_handler)


def test_shards_hold_every_tensor_once_and_read_back(tmp_path):
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(7)}
    files.write_tensors(tmp_path, "model", tensors, shard_bytes=100)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert shards == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    index = files.read_json(tmp_path / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == 280
    assert index["weight_map"].keys() == tensors.keys()
    assert all(files.tensor_shapes(tmp_path, name[:-12])[key] == (10,) for key, name in index["weight_map"].items())
    assert same_bits(dict(files.read_tensors(tmp_path, "model")), tensors)


# --- model directories ------------------------------------------------------------------------------------


def test_a_saved_model_loads_in_transformers_with_the_served_bits(directory, tmp_path):
    engine = trainer(directory)
    train(engine, 2)
    engine.save_pretrained(str(tmp_path / "model"))
    manifest, payload = engine.export("anchor")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    served = decode_update(manifest, payload)
    assert len(served) == len(stored)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert loaded.generation_config.eos_token_id == 1
    live = dict(engine._parameters)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, live[name].to(torch.bfloat16))
        assert torch.equal(stored[name], parameter)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.encode("sun\n") == AutoTokenizer.from_pretrained(directory).encode("sun\n")
    assert tokenizer.chat_template
    again = trainer(str(tmp_path / "model"), serve_dtype="float32")
    datums = rows(3, [9, 6])
    _, expected = plain_logprobs(None, datums, loaded.float())
    for a, b in zip(again.forward(datums).logprobs, expected, strict=True):
        np.testing.assert_allclose(a, b.detach().numpy(), atol=1e-5)


# --- exports ----------------------------------------------------------------------------------------------


def bits_of(engine):
    return {n: p.detach().to(torch.bfloat16).view(torch.uint16).numpy().copy() for n, p in engine._parameters.items()}


def test_the_first_export_is_an_anchor_whatever_was_asked(directory):
    engine = trainer(directory)
    manifest, _ = engine.export("delta")
    assert (manifest.kind, manifest.version, manifest.base_version) == ("anchor", 0, None)
    assert manifest.full_bytes == 804_224 * 2
    assert manifest.tensors[0].name == "model.embed_tokens.weight"
    assert "lm_head.weight" not in {entry.name for entry in manifest.tensors}
    assert {entry.dtype for entry in manifest.tensors} == {"BF16"}


def test_deltas_are_against_the_last_published_bits_not_the_last_exported(directory):
    engine = trainer(directory)
    engine.export("anchor")
    engine.published(0)
    base = bits_of(engine)
    train(engine, 1, 1e-5)
    lost, _ = engine.export("delta")
    assert (lost.version, lost.base_version) == (1, 0)
    train(engine, 1, 1e-5)
    manifest, payload = engine.export("delta")
    assert (manifest.kind, manifest.version, manifest.base_version) == ("delta", 2, 0)
    assert 0 < manifest.changed < 0.5 * 804_224
    now = bits_of(engine)
    assert manifest.changed == sum(int((now[n] != base[n]).sum()) for n in now)
    restored = apply_update(base, decode_update(manifest, payload))
    assert all((restored[n] == now[n]).all() for n in now)


def test_export_is_idempotent_and_training_does_not_touch_what_was_exported(directory):
    engine = trainer(directory, serve_dtype="float32")
    engine.export("anchor")
    engine.published(0)
    train(engine, 1)
    first = engine.export("delta")
    second = engine.export("delta")
    assert first[0] == second[0]
    assert first[1] == second[1]
    exported = {n: p.detach().numpy().view(np.uint32).copy() for n, p in engine._parameters.items()}
    train(engine, 1)
    engine.published(1)
    engine.published(1)
    now = {n: p.detach().numpy().view(np.uint32) for n, p in engine._parameters.items()}
    manifest, _ = engine.export("delta")
    assert manifest.base_version == 1
    assert manifest.changed == sum(int((now[n] != exported[n]).sum()) for n in now)


def test_a_version_that_was_not_exported_cannot_be_published(directory):
    engine = trainer(directory)
    with pytest.raises(WeightsError, match="version 3 was published, but version None was exported"):
        engine.published(3)


def test_after_a_load_the_next_export_is_an_anchor(directory, tmp_path):
    engine = trainer(directory)
    engine.export("anchor")
    engine.published(0)
    train(engine, 1)
    engine.save(str(tmp_path / "one"))
    engine.load(str(tmp_path / "one"))
    assert engine.export("delta")[0].kind == "anchor"
