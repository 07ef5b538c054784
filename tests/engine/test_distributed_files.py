"""Checkpoints and exports of several ranks: any number of them reads what any other number wrote."""

import numpy as np
import pytest
import torch
from ranks import fill_disk, load, on_ranks, publish, refused_load, save
from safetensors.torch import load_file
from trainer_builders import tiny_model
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from rlorch.engine import files
from rlorch.weights.codec import apply_update, decode_update

pytestmark = pytest.mark.engine

STEPS = [[12, 12], [9, 14, 3]]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory)


@pytest.fixture(scope="module")
def checkpoints(model, tmp_path_factory):
    """By the number of ranks that wrote it: (path, what `save` returned on every rank)."""
    folder = tmp_path_factory.mktemp("checkpoints")
    made = {}
    for world in (1, 2):
        path = str(folder / f"of-{world}")
        made[world] = path, on_ranks(world, save, folder, model, path, STEPS)
    return made


def same(a, b):
    return a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


@pytest.mark.parametrize(("writers", "readers"), [(2, 1), (1, 2), (2, 3), (2, 2)])
def test_a_state_loads_bit_for_bit_into_another_number_of_ranks(model, checkpoints, tmp_path, writers, readers):
    path, of_writers = checkpoints[writers]
    digests, saved, after = of_writers[0]
    for version, again, loaded, later in on_ranks(readers, load, tmp_path, model, path, str(tmp_path / "again")):
        assert version == len(STEPS)
        assert same(loaded, saved)
        if readers == writers:
            assert again == digests, "equal states are equal files"
            assert same(later, after), "training went on as if nothing had happened"
        else:
            for name, value in after.items():
                np.testing.assert_allclose(later[name], value, atol=2e-5, rtol=1e-3)


def test_every_rank_returns_the_digests_of_all_files(checkpoints):
    path, of_ranks = checkpoints[2]
    digests = of_ranks[0][0]
    assert digests == of_ranks[1][0] == files.seal(files.Path(path))
    assert {"weights-rank00000.safetensors", "weights-rank00001.safetensors", "trainer.json"} <= digests.keys()


def test_a_checkpoint_of_one_rank_keeps_its_layout(checkpoints):
    path, of_ranks = checkpoints[1]
    names = {"weights.safetensors", "optimizer.safetensors", "generator.safetensors", "trainer.json"}
    assert of_ranks[0][0].keys() == names
    assert files.read_record(files.Path(path) / "trainer.json")["format"] == 1


def test_a_damaged_file_of_one_rank_is_refused_by_all_and_changes_nothing(model, checkpoints, tmp_path):
    path, _ = checkpoints[2]
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for source in files.Path(path).iterdir():
        (damaged / source.name).write_bytes(source.read_bytes())
    victim = damaged / "optimizer-rank00001.safetensors"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    for world in (1, 2):
        for error, unchanged in on_ranks(world, refused_load, tmp_path, model, str(damaged)):
            assert "optimizer-rank00001.safetensors has digest" in error
            assert unchanged


@pytest.mark.parametrize("serve_dtype", ["bfloat16", "float32"])
def test_ranks_export_what_one_process_would(model, tmp_path, serve_dtype):
    ((one, _),) = on_ranks(1, publish, tmp_path, model, serve_dtype, str(tmp_path / "one"))
    of_ranks = on_ranks(2, publish, tmp_path, model, serve_dtype, str(tmp_path / "two"))
    (first, held), (second, other_held) = of_ranks
    state = None
    for (manifest, payload, weights), (expected, one_payload, one_weights), (copy, nothing, _) in zip(
        first, one, second, strict=True
    ):
        assert same(weights, one_weights), "the premise: both hold the same weights"
        assert manifest == expected == copy
        assert payload == one_payload
        assert nothing == b""
        state = apply_update(state, decode_update(manifest, payload))
    assert [manifest.kind for manifest, *_ in first] == ["anchor", "delta", "delta"]
    for name in held:
        whole = state[name].size
        assert held[name] + other_held[name] == whole, "each rank keeps its own rows of the published bits only"
        assert held[name] <= -(-whole // 2) + 128
    written = {path.name for path in (tmp_path / "one").iterdir()}
    assert written == {path.name for path in (tmp_path / "two").iterdir()}
    for name in sorted(written):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert load_file(tmp_path / "two" / "model.safetensors").keys() == state.keys()


def test_a_full_disk_of_rank_0_is_everyones_storage_error(model, tmp_path):
    first, second = on_ranks(2, fill_disk, tmp_path, model, str(tmp_path))
    assert first == second
    said, stepped = first
    assert all("cannot write" in message for message in said), said
    assert stepped == 2


def test_missing_pieces_are_noticed(tmp_path):
    import torch

    half = {"a": torch.arange(6.0).reshape(2, 3)}
    files.write_tensors(tmp_path, "weights-rank00000", half, pieces={"a": (0, (4, 3))})
    with pytest.raises(files.StorageError, match=r"'a' of shape \(4, 3\) is there in rows \[\(0, 2\)\]"):
        files.tensor_shapes(tmp_path, "weights")
    files.write_tensors(tmp_path, "weights-rank00001", half, pieces={"a": (2, (4, 3))})
    assert files.tensor_shapes(tmp_path, "weights") == {"a": (4, 3)}
    ((_, rows),) = files.read_tensors(tmp_path, "weights", {"a": (1, 2)})
    assert torch.equal(rows, torch.tensor([[3.0, 4.0, 5.0], [0.0, 1.0, 2.0]]))
    ((_, none),) = files.read_tensors(tmp_path, "weights", {"a": (4, 0)})
    assert none.shape == (0, 3)


@pytest.fixture(scope="module")
def mixture(model, tmp_path_factory):
    """A mixture of experts: one tensor for all experts of a layer in the model, one for each in the checkpoint."""
    path = tmp_path_factory.mktemp("moe")
    config = Qwen3MoeConfig(
        vocab_size=128,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        moe_intermediate_size=24,
        num_experts=3,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(model).save_pretrained(path)
    return str(path)


def test_ranks_export_a_mixture_of_experts_as_one_process_would(mixture, tmp_path):
    ((one, _),) = on_ranks(1, publish, tmp_path, mixture, "bfloat16", str(tmp_path / "one"))
    (first, _), (second, _) = on_ranks(2, publish, tmp_path, mixture, "bfloat16", str(tmp_path / "two"))
    for (manifest, payload, weights), (expected, one_payload, one_weights), (copy, nothing, _) in zip(
        first, one, second, strict=True
    ):
        assert {entry.name for entry in manifest.tensors} == {entry.name for entry in expected.tensors}
        assert any(".experts.2.down_proj.weight" in entry.name for entry in manifest.tensors)
        assert (copy, nothing) == (manifest, b"")
        for name, value in weights.items():
            np.testing.assert_allclose(value, one_weights[name], atol=2e-5, rtol=0)
        if same(weights, one_weights):
            assert (manifest, payload) == (expected, one_payload)
    assert first[0][0] == one[0][0], "before the first step the weights are equal"
    written = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "two", dtype=torch.float32)
    expected = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.float32)
    for (name, value), other in zip(written.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, atol=2e-3, rtol=0, msg=name)
