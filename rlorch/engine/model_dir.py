"""What an engine must know of a model directory before it loads anything."""

import json
from pathlib import Path

from rlorch.errors import ModelError
from rlorch.specs import Dtype


def check_model_dir(model_dir: str | Path) -> Path:
    """The directory, absolute. Raises `ModelError` if it holds no model config."""
    path = Path(model_dir).resolve()
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json: a model directory as save_pretrained writes it is needed")
    return path


def stop_token_ids(model_dir: Path) -> tuple[int, ...]:
    """The ids that end a completion: EOS of the generation config and of the model config, sorted."""
    found: set[int] = set()
    for file in ("generation_config.json", "config.json"):
        path = model_dir / file
        value = json.loads(path.read_bytes()).get("eos_token_id") if path.is_file() else None
        found |= set(value if isinstance(value, list) else [] if value is None else [value])
    return tuple(sorted(found))


def has_tokenizer(model_dir: Path) -> bool:
    """Whether the directory holds a tokenizer; stop strings need one."""
    return any((model_dir / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))


def resolve_dtype(dtype: Dtype) -> str:
    """The torch name of the served dtype; auto is bfloat16, as in `TrainerSpec.serve_dtype`."""
    return "bfloat16" if dtype == "auto" else dtype
