"""The anchor of a model directory is what a trainer of that model exports before its first step."""

import os

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig

from rlorch.engine.base_anchor import encode_base_anchor
from rlorch.engine.tiny import make_character_tokenizer, make_tiny_model
from rlorch.engine.trainer import TorchTrainer
from rlorch.errors import ModelError
from rlorch.local.base_anchor import make_base_anchor
from rlorch.specs import Dtype, TrainerSpec, WeightsSpec
from rlorch.weights.codec import apply_update, decode_update
from rlorch.weights.update import check_state

pytestmark = pytest.mark.engine

SMALL = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip


def exported_digest(directory: str, dtype: Dtype) -> str:
    spec = TrainerSpec(device="cpu", serve_dtype=dtype)
    manifest, _ = TorchTrainer(directory, spec, WeightsSpec()).export("anchor")
    return manifest.digest


@pytest.mark.parametrize("dtype", ["auto", "float32", "float16"])
def test_the_base_anchor_has_the_digest_of_the_trainers_export(tmp_path, dtype):
    make_tiny_model(str(tmp_path))
    manifest, payload = encode_base_anchor(str(tmp_path), dtype)
    assert (manifest.version, manifest.kind) == (0, "anchor")
    assert manifest.digest == exported_digest(str(tmp_path), dtype)
    check_state(manifest, apply_update(None, decode_update(manifest, payload)))


@pytest.mark.parametrize(
    "config",
    [
        MixtralConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1),
        GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=1, bos_token_id=1),
    ],
    ids=lambda config: config.model_type,
)
def test_a_bfloat16_checkpoint_with_fused_or_tied_weights_has_it_too(tmp_path, config):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path)
    make_character_tokenizer().save_pretrained(tmp_path)
    manifest, _ = encode_base_anchor(str(tmp_path))
    assert manifest.digest == exported_digest(str(tmp_path), "auto")


async def test_an_unchanged_directory_is_encoded_once_and_a_changed_one_again(tmp_path):
    model, store = tmp_path / "model", tmp_path / "store"
    make_tiny_model(str(model), seed=1)
    first = await make_base_anchor(str(model), str(store), "float32")
    payload = store / "payloads" / first.payload
    written = payload.stat().st_mtime_ns
    assert await make_base_anchor(str(model), str(store), "float32") == first
    assert payload.stat().st_mtime_ns == written
    payload.unlink()
    assert await make_base_anchor(str(model), str(store), "float32") == first
    assert payload.is_file()
    make_tiny_model(str(model), seed=2)
    os.utime(model / "model.safetensors", ns=(1, 1))
    assert (await make_base_anchor(str(model), str(store), "float32")).digest != first.digest


async def test_a_directory_that_is_not_there_is_the_users_error(tmp_path):
    with pytest.raises(ModelError, match="no such directory"):
        await make_base_anchor(str(tmp_path / "absent"), str(tmp_path), "auto")
