"""Tokenizers, from the model's own directory."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from rlorch.errors import ModelError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
"""At least one of these holds a tokenizer's vocabulary."""


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a model directory or hub id, a `rlorch.ports.Tokenizer`.

    Raises:
        ModelError: there is none, it does not load, or it has no end-of-sequence token (generation would never end).
    """
    directory = Path(model)
    if directory.is_dir() and not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(
            f"{model}: no tokenizer (none of {', '.join(TOKENIZER_FILES)}); copy the model's tokenizer there"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{model}: the tokenizer does not load: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{model}: the tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json")
    return tokenizer
