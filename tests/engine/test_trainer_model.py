import json
import shutil

import pytest
import torch
from trainer_builders import plain_logprobs, rows, tiny_model
from transformers import AutoModelForCausalLM, Cohere2Config, Gemma2Config, GPT2Config, GraniteConfig

from rlorch.engine.forward import score
from rlorch.engine.model import load_policy, resolve_compute_dtype
from rlorch.engine.reference import TorchReference
from rlorch.engine.tokenizer import load_tokenizer
from rlorch.errors import ConfigError, ModelError, PlacementError
from rlorch.specs import TrainerSpec

pytestmark = pytest.mark.engine

SMALL = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_model(tmp_path_factory)


@pytest.fixture
def copy(directory, tmp_path):
    shutil.copytree(directory, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SMALL, final_logit_softcapping=2.0, query_pre_attn_scalar=16),
        Cohere2Config(**{k: v for k, v in SMALL.items() if k != "head_dim"}, logit_scale=0.3),
        GraniteConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"}, logits_scaling=4.0),
        GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=1, bos_token_id=1),
    ],
    ids=lambda config: config.model_type,
)
def test_scaled_and_capped_logits_equal_the_models_own(config, tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    datums = rows(2, [3, 11, 7])
    found = score(load_policy(str(tmp_path)), TrainerSpec(micro_batch_tokens=24), datums)
    _, expected = plain_logprobs(str(tmp_path), datums, AutoModelForCausalLM.from_pretrained(tmp_path).eval())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(a), b.detach(), rtol=1e-4, atol=1e-5)


def test_padding_and_micro_batches_do_not_change_what_is_scored(directory):
    datums = rows(3, [1, 14, 30, 2, 14, 9, 200])
    _, expected = plain_logprobs(directory, datums)
    for budget in (1, 40, 8192):
        found = TorchReference(directory, TrainerSpec(micro_batch_tokens=budget, logprob_chunk_tokens=16)).logprobs(
            datums
        )
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(a), b.detach(), rtol=1e-5, atol=1e-5)


def test_bfloat16_compute_stays_close_to_float32(directory):
    datums = rows(3, [14, 9])
    exact = TorchReference(directory, TrainerSpec()).logprobs(datums)
    found = TorchReference(directory, TrainerSpec(compute_dtype="bfloat16")).logprobs(datums)
    for a, b in zip(found, exact, strict=True):
        assert abs(a - b).max() < 0.05
        assert (a != b).any()


def test_a_directory_that_is_no_model_says_what_it_lacks(copy):
    with pytest.raises(ModelError, match="no such directory"):
        load_policy("/nowhere/at/all")
    (copy / "model.safetensors").rename(copy / "hidden")
    (copy / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"no weights .* pytorch_model.bin is a pickle"):
        load_policy(str(copy))
    (copy / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_policy(str(copy))


def test_an_unknown_architecture_is_refused(copy):
    (copy / "config.json").write_text(json.dumps({"model_type": "no_such_architecture"}))
    with pytest.raises(ModelError, match="no_such_architecture"):
        load_policy(str(copy))


def test_weights_that_do_not_fit_the_config_are_refused_rather_than_initialised(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5, "layer_types": None}))
    with pytest.raises(ModelError, match="11 tensors are missing"):
        load_policy(str(copy))


def test_a_model_without_a_tokenizer_or_its_end_is_refused(copy):
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "eos_token"}))
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        load_tokenizer(str(copy))
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        load_tokenizer(str(copy))


def test_logits_that_the_head_cannot_reproduce_are_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"logit_scale": 0.5}))  # Qwen3 does not scale its logits
    with pytest.raises(ModelError, match="does more to its logits"):
        load_policy(str(copy))


def test_devices_and_dtypes_that_do_not_work_are_refused():
    with pytest.raises(PlacementError, match="'gpu' cannot be used"):
        load_policy("unused/unused", device="gpu")
    with pytest.raises(ConfigError, match="loss scaling"):
        resolve_compute_dtype("float16", torch.device("cpu"))


def test_dropout_is_off_while_activation_checkpointing_trains(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=1, bos_token_id=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), activation_checkpointing=True)
    first, second = (score(policy, TrainerSpec(), rows(2, [9, 5])) for _ in range(2))
    assert all((a == b).all() for a, b in zip(first, second, strict=True))
    assert policy.config.resid_pdrop == 0.1
