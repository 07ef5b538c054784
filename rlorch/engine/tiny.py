"""A model of 0.8M parameters that learns on a CPU: a Qwen3 with a character tokenizer.

For the quickstart and for tests. The tokenizer knows printable ASCII, newline, and one token for the fixed beginning of
reasoning_gym's spell_backward questions, so that such a prompt takes 5 to 7 tokens instead of 54.
"""

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from rlorch.engine.files import write_tensors
from rlorch.engine.serving import checkpoint_tensors

SPELL_BACKWARD_PREFIX = "Spell this word backward (example: sun -> nus): "
"""How every question of reasoning_gym's spell_backward begins."""
VOCAB_SIZE = 128
PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
PAD_ID, EOS_ID = 0, 1
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}"
)
"""Messages end in a newline, answers in EOS: a user message renders as the plain prompt does."""


def make_tiny_model(directory: str, seed: int = 0) -> None:
    """Write a model directory: float32 safetensors, config, tokenizer, chat template. Equal seeds give equal bytes.

    Qwen3 with vocabulary 128, hidden 128, MLP 384, 4 layers, 4 heads, 2 KV heads of dimension 32, tied embeddings,
    804k parameters, randomly initialised.
    """
    Path(directory).mkdir(parents=True, exist_ok=True)
    tokenizer = make_character_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(_config())
    model.generation_config.eos_token_id = EOS_ID
    model.generation_config.pad_token_id = PAD_ID
    model.config.architectures = [type(model).__name__]
    model.config.dtype = torch.float32
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    write_tensors(Path(directory), "model", checkpoint_tensors(model))


def make_character_tokenizer() -> PreTrainedTokenizerFast:
    """Pad 0, EOS 1, unknown 2, one token per character, the question's prefix, reserved tokens up to 128."""
    pieces = [PAD, EOS, UNK, *CHARACTERS]
    core = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], unk_token=UNK))
    core.decoder = decoders.Fuse()
    core.add_special_tokens([PAD, EOS, UNK])
    core.add_tokens([AddedToken(SPELL_BACKWARD_PREFIX, normalized=False)])
    reserved = [f"<reserved_{i}>" for i in range(VOCAB_SIZE - core.get_vocab_size())]
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in reserved])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def _config() -> Qwen3Config:
    return Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
