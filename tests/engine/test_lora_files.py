import json
import os
import shutil

import numpy as np
import pytest
import torch
from lora_builders import ADAM, LARGE, SMALL, TIS, base_model, bits, lora_base, peft_model, same_bits, stored, train
from safetensors.torch import load_file, save_file
from trainer_builders import plain_logprobs, rows, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rlorch.engine import files
from rlorch.engine.trainer import TorchTrainer
from rlorch.errors import StorageError, UserError
from rlorch.specs import LoraSpec, TrainerSpec, WeightsSpec

pytestmark = pytest.mark.engine

DATUMS = rows(1, [14, 9, 5])


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_model(tmp_path_factory)


@pytest.fixture
def base(directory):
    return lora_base(directory)


# --- states -----------------------------------------------------------------------------------------------


def test_an_adapter_goes_on_bit_for_bit_from_a_state_on_another_host(directory, base, tmp_path):
    whole = base.add(SMALL)
    train(whole, DATUMS, 3)
    digests = whole.save(str(tmp_path / "three"))
    train(whole, DATUMS, 2)
    other = lora_base(directory)
    other.add(LARGE)
    resumed = other.add(SMALL)
    resumed.forward_backward(DATUMS, TIS)  # accumulated, to be dropped
    assert resumed.load(str(tmp_path / "three")) == 3
    train(resumed, DATUMS, 2)
    assert resumed.version == 5
    assert same_bits(bits(resumed), bits(whole))
    assert digests == {name: files.file_digest(tmp_path / "three" / name) for name in os.listdir(tmp_path / "three")}


def test_the_weights_of_a_state_come_with_a_fresh_optimizer(base, tmp_path):
    adapter = base.add(SMALL)
    train(adapter, DATUMS, 2)
    adapter.save(str(tmp_path / "two"))
    kept = bits(adapter)
    train(adapter, DATUMS, 1)
    assert adapter.load(str(tmp_path / "two"), optimizer=False) == adapter.version == 2
    assert same_bits(bits(adapter), {name: t for name, t in kept.items() if name in adapter._parameters})


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "trainer.json"])
def test_a_damaged_or_missing_file_of_an_adapter_is_named_and_changes_nothing(base, tmp_path, name):
    adapter = base.add(SMALL)
    train(adapter, DATUMS, 1)
    adapter.save(str(tmp_path / "one"))
    train(adapter, DATUMS, 1)
    before = bits(adapter)
    path = tmp_path / "one" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x81
    path.write_bytes(data)
    with pytest.raises(StorageError, match=rf"{name} .*damaged"):
        adapter.load(str(tmp_path / "one"))
    path.unlink()
    with pytest.raises(StorageError, match=name):
        adapter.load(str(tmp_path / "one"))
    assert adapter.version == 2
    assert same_bits(bits(adapter), before)


def test_states_of_other_adapters_and_of_whole_models_are_refused(directory, base, tmp_path):
    base.add(LARGE).save(str(tmp_path / "large"))
    full = TorchTrainer(directory, TrainerSpec(threads=1), WeightsSpec())
    full.save(str(tmp_path / "full"))
    adapter = base.add(SMALL)
    adapter.save(str(tmp_path / "small"))
    with pytest.raises(UserError, match=r"rank is 16 there and 4 here, alpha is 32\.0 there and 8\.0 here, train_mlp"):
        adapter.load(str(tmp_path / "large"))
    with pytest.raises(UserError, match="state of a whole model"):
        adapter.load(str(tmp_path / "full"))
    with pytest.raises(StorageError, match="another model"):
        full.load(str(tmp_path / "small"))
    assert adapter.version == full.version == 0


def test_an_adapter_is_not_written_over_anything(base, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    adapter = base.add(SMALL)
    for write in (adapter.save, adapter.save_adapter, adapter.save_pretrained):
        with pytest.raises(StorageError, match="is not empty"):
            write(str(tmp_path))
    assert os.listdir(tmp_path) == ["notes.txt"]


# --- PEFT directories -------------------------------------------------------------------------------------


def test_a_peft_directory_has_no_pickles_and_names_its_base(directory, base, tmp_path):
    base.add(LARGE)
    adapter = base.add(SMALL)
    train(adapter, DATUMS, 1)
    digests = adapter.save_adapter(str(tmp_path / "a"))
    assert sorted(digests) == ["adapter_config.json", "adapter_model.safetensors"]
    assert adapter.save_adapter(str(tmp_path / "b")) == digests
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8, "LORA")
    assert config["base_model_name_or_path"] == directory
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    )
    tensors = stored(tmp_path / "a")
    assert tensors.keys() == {"base_model.model." + name for name in adapter._parameters}
    assert all(torch.equal(tensors["base_model.model." + n], p) for n, p in adapter._parameters.items())


def test_what_peft_saves_loads_and_scores_as_peft_does(directory, base, tmp_path):
    source = base.add(SMALL)
    train(source, DATUMS, 2)
    source.save_adapter(str(tmp_path / "ours"))
    model = peft_model(directory, tmp_path / "ours")
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(tmp_path / "theirs")
    assert any(".lora_" not in name for name in stored(tmp_path / "theirs"))
    adapter = base.add(SMALL)
    train(adapter, rows(9, [7]), 3)
    adapter.forward_backward(DATUMS, TIS)
    assert adapter.load_adapter(str(tmp_path / "theirs")) == adapter.version == 0
    assert same_bits(bits(adapter), {n: p.detach() for n, p in source._parameters.items()})
    with pytest.raises(UserError, match="no forward_backward"):
        adapter.optim_step(ADAM, "none")
    _, expected = plain_logprobs(directory, DATUMS, model)
    for found, wanted in zip(adapter.forward(DATUMS).logprobs, expected, strict=True):
        np.testing.assert_allclose(found, wanted.detach().numpy(), atol=2e-5)


def test_an_adapter_that_carries_other_base_weights_is_refused(base, tmp_path):
    adapter = base.add(SMALL)
    adapter.save_adapter(str(tmp_path / "a"))
    embedding = base.policy.model.get_input_embeddings().weight.detach()
    tensors = stored(tmp_path / "a")
    for name, tensor in (("model.embed_tokens.weight", embedding + 1), ("model.other.weight", embedding)):
        save_file(tensors | {f"base_model.model.{name}": tensor}, tmp_path / "a" / "adapter_model.safetensors")
        with pytest.raises(UserError, match=f"also holds '{name}'"):
            adapter.load_adapter(str(tmp_path / "a"))
    tensors |= {"base_model.model.model.embed_tokens.weight": embedding}
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    assert adapter.load_adapter(str(tmp_path / "a")) == 0


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (LoraSpec(rank=8, alpha=8), "r is 8 there and 4 here"),
        (LoraSpec(rank=4, alpha=16), r"lora_alpha is 16 there and 8\.0 here"),
        (
            LoraSpec(rank=4, alpha=8, train_mlp=False, train_unembed=False),
            r"k_proj\+o_proj\+q_proj\+v_proj there and down_proj\+gate_proj\+k_proj\+lm_head",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_with_both_sides_named(base, tmp_path, other, problem):
    base.add(other).save_adapter(str(tmp_path / "other"))
    adapter = base.add(SMALL)
    train(adapter, DATUMS, 1)
    before = bits(adapter)
    with pytest.raises(UserError, match=problem):
        adapter.load_adapter(str(tmp_path / "other"))
    assert adapter.version == 1
    assert same_bits(bits(adapter), before)


def test_adapters_that_are_more_than_lora_or_no_safetensors_are_refused(base, tmp_path):
    adapter = base.add(SMALL)
    adapter.save_adapter(str(tmp_path / "good"))
    assert adapter.load_adapter(str(tmp_path / "good")) == 0

    def variant(name, **changes):
        shutil.copytree(tmp_path / "good", tmp_path / name)
        config = json.loads((tmp_path / "good" / "adapter_config.json").read_text())
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config | changes))
        return tmp_path / name

    changes = {
        "use_dora": True,
        "use_rslora": True,
        "bias": "all",
        "rank_pattern": {"q_proj": 2},
        "init_lora_weights": "pissa",
    }
    for key, value in changes.items():
        with pytest.raises(UserError, match=f"{key} is"):
            adapter.load_adapter(str(variant(key, **{key: value})))
    pickled = variant("pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(StorageError, match=r"no adapter_model\.safetensors"):
        adapter.load_adapter(str(pickled))
    cut = variant("cut")
    os.truncate(cut / "adapter_model.safetensors", 1000)
    with pytest.raises(StorageError, match=r"cut"):
        adapter.load_adapter(str(cut))
    reshaped = variant("reshaped")
    tensors = load_file(reshaped / "adapter_model.safetensors")
    first = min(tensors)
    save_file(tensors | {first: tensors[first][:, :3].contiguous()}, reshaped / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"another model: .*\(4, 3\) there"):
        adapter.load_adapter(str(reshaped))
    with pytest.raises(StorageError, match="adapter_config"):
        adapter.load_adapter(str(tmp_path / "nowhere"))


# --- merged models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [SMALL, LARGE, LoraSpec(rank=2, train_unembed=False)])
def test_a_merged_model_computes_what_base_and_adapter_do(directory, tmp_path, lora):
    base = lora_base(directory, serve_dtype="float32")
    base.add(SMALL)
    adapter = base.add(lora)
    train(adapter, DATUMS, 2)
    plain = base.forward(DATUMS).logprobs
    digests = adapter.save_pretrained(str(tmp_path / "model"))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= digests.keys()
    config = AutoConfig.from_pretrained(tmp_path / "model")
    assert config.tie_word_embeddings is not lora.train_unembed
    model, expected = plain_logprobs(str(tmp_path / "model"), DATUMS)
    for found, wanted, without in zip(adapter.forward(DATUMS).logprobs, expected, plain, strict=True):
        np.testing.assert_allclose(found, wanted.detach().numpy(), atol=1e-4)
        assert np.abs(found - without).max() > 1e-2
    original = base_model(directory)
    assert torch.equal(model.get_input_embeddings().weight, original.get_input_embeddings().weight)
    assert torch.equal(model.model.norm.weight, original.model.norm.weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").encode("sun") is not None


def test_a_merged_model_is_merged_in_float32_and_then_rounded_once(directory, base, tmp_path):
    adapter = base.add(LoraSpec(rank=4, train_unembed=False))
    train(adapter, DATUMS, 2)
    adapter.save_pretrained(str(tmp_path / "model"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    merged = {n: p for n, p in loaded.named_parameters() if n.endswith("q_proj.weight")}
    assert len(merged) == 4
    original = dict(base_model(directory).named_parameters())
    for name, found in merged.items():
        stem = name.removesuffix(".weight")
        a, b = (adapter._parameters[f"{stem}.lora_{letter}.weight"].detach() for letter in "AB")
        assert torch.equal(found, (original[name] + b @ a * (32.0 / 4)).to(torch.bfloat16))
    reopened = lora_base(str(tmp_path / "model"))
    train(reopened.add(SMALL), DATUMS, 1)
