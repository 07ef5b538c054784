import filecmp
import os

import pytest
import torch
from safetensors.torch import load_file
from trainer_builders import tiny_model
from transformers import AutoModelForCausalLM

from rlorch.engine.tiny import CHARACTERS, SPELL_BACKWARD_PREFIX, make_tiny_model
from rlorch.engine.tokenizer import load_tokenizer

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_model(tmp_path_factory)


def test_the_model_has_the_recipes_shape(directory):
    model = AutoModelForCausalLM.from_pretrained(directory)
    config = model.config
    assert (config.model_type, config.vocab_size, config.hidden_size, config.num_hidden_layers) == (
        "qwen3",
        128,
        128,
        4,
    )
    assert sum(p.numel() for p in model.parameters()) == 804_224
    assert (config.eos_token_id, config.pad_token_id) == (1, 0)
    assert {tensor.dtype for tensor in load_file(f"{directory}/model.safetensors").values()} == {torch.float32}


def test_equal_seeds_give_equal_bytes_and_other_seeds_other_weights(tmp_path, directory):
    before = torch.get_rng_state()
    make_tiny_model(str(tmp_path / "again"), 0)
    make_tiny_model(str(tmp_path / "other"), 1)
    assert torch.equal(before, torch.get_rng_state())
    names = os.listdir(directory)
    assert sorted(filecmp.cmpfiles(directory, tmp_path / "again", names, shallow=False)[0]) == sorted(names)
    assert not filecmp.cmp(f"{directory}/model.safetensors", tmp_path / "other" / "model.safetensors", shallow=False)


def test_real_questions_take_five_to_seven_tokens(directory):
    reasoning_gym = pytest.importorskip("reasoning_gym")
    tokenizer = load_tokenizer(directory)
    words = reasoning_gym.create_dataset("spell_backward", size=200, seed=1234, min_word_len=3, max_word_len=5)
    for item in (words[i] for i in range(200)):
        prompt = item["question"] + "\n"
        tokens = tokenizer.encode(prompt)
        assert 5 <= len(tokens) <= 7
        assert tokens[0] == len(CHARACTERS) + 3
        assert tokenizer.decode(tokens) == prompt
        assert tokenizer.decode(tokenizer.encode(item["answer"])) == item["answer"]


def test_decode_undoes_encode_on_everything_printable(directory):
    tokenizer = load_tokenizer(directory)
    for text in (CHARACTERS, "  two  spaces ", f"a {SPELL_BACKWARD_PREFIX}b", "\n\n", "don't ."):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("é") == [tokenizer.unk_token_id]
    assert tokenizer.decode([97, 1, 0, 120], skip_special_tokens=True) == tokenizer.decode([97])
    assert len(tokenizer) == 128


def test_a_chat_renders_as_the_plain_prompt_and_answer(directory):
    tokenizer = load_tokenizer(directory)
    messages = [{"role": "user", "content": SPELL_BACKWARD_PREFIX + "sun"}, {"role": "assistant", "content": "nus"}]
    whole = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    prompt = tokenizer.encode(SPELL_BACKWARD_PREFIX + "sun\n")
    assert whole["input_ids"] == prompt + tokenizer.encode("nus") + [tokenizer.eos_token_id]
    assert whole["assistant_masks"] == [0] * len(prompt) + [1] * 4
    asked = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)
    assert asked["input_ids"] == prompt
