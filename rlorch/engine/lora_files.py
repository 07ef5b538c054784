"""An adapter's files: its training state, the PEFT directory that other tools read, and the model it merges into.

All safetensors and JSON, written durably with digests as `rlorch.engine.files` does; reading never changes anything:
it returns tensors that have been checked, names and shapes included, or raises.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from rlorch.engine import files
from rlorch.engine.model import Policy
from rlorch.errors import StorageError, UserError
from rlorch.specs import LoraSpec

FORMAT = 1
"""Layout of what `write_state` writes."""
STATE_FILE = "trainer.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_STEM = "adapter_model"
PEFT_PREFIX = "base_model.model."
"""What peft writes before the name of every tensor."""
PLAIN = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    "use_dora": (None, False),
    "use_rslora": (None, False),
    "lora_bias": (None, False),
    "use_qalora": (None, False),
    "use_bdlora": (None,),
    "alora_invocation_tokens": (None,),
    "layer_replication": (None, []),
    "init_lora_weights": (None, False, "gaussian", "eva", "orthogonal", True),  # others change the base too
    "fan_in_fan_out": (None, False),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
}
"""Settings of `adapter_config.json` under which an adapter is W + (alpha / r) B A and nothing else."""


# --- state ------------------------------------------------------------------------------------------------


def write_state(
    path: str, lora: LoraSpec, version: int, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]
) -> dict[str, str]:
    """Write a training state to the empty directory `path`; digest by file name. Raises `StorageError`."""
    directory = files.empty_directory(path)
    files.write_tensors(directory, "weights", weights)
    files.write_tensors(directory, "optimizer", moments)
    digests = files.seal(directory)
    record = {"format": FORMAT, "version": version, "adapter": lora.model_dump(), "files": digests}
    files.write_record(directory / STATE_FILE, record)
    return files.seal(directory)


def read_state(
    path: str, lora: LoraSpec, weights: Mapping[str, Tensor]
) -> tuple[int, dict[str, Tensor], dict[str, Tensor]]:
    """(version, weights, moments) of what `write_state` wrote for an adapter like this one.

    Raises:
        StorageError: a file is absent or damaged.
        UserError: the state of a whole model or of another adapter.
    """
    directory = Path(path)
    state = files.read_record(directory / STATE_FILE)
    if state.get("format") != FORMAT:
        raise StorageError(f"{directory / STATE_FILE}: format {state.get('format')!r}, this version reads {FORMAT}")
    there = state.get("adapter")
    if there is None:
        raise UserError(f"{directory} is the state of a whole model, this model is an adapter: load it into a full one")
    here = lora.model_dump()
    differing = [key for key in here if key != "seed" and there.get(key) != here[key]]
    if differing:
        raise UserError(
            f"{directory} is the state of another adapter: "
            + ", ".join(f"{key} is {there.get(key)} there and {here[key]} here" for key in differing)
        )
    files.verify(directory, state["files"])
    found = dict(files.read_tensors(directory, "weights"))
    moments = dict(files.read_tensors(directory, "optimizer"))
    _check_tensors(directory, found, weights)
    strangers = [name for name in moments if name.partition(".")[2] not in weights]
    if strangers:
        raise UserError(f"{directory} is the state of another adapter: it has moments of {strangers[0]!r}")
    return int(state["version"]), found, moments


# --- PEFT directories -------------------------------------------------------------------------------------


def write_adapter(
    path: str, model: str, lora: LoraSpec, targets: Sequence[str], weights: Mapping[str, Tensor]
) -> dict[str, str]:
    """Write a PEFT directory for the base `model` to the empty directory `path`; digest by file name.

    Raises:
        StorageError: the directory is not empty or a file cannot be written.
    """
    directory = files.empty_directory(path)
    alpha = int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType] (an int by annotation, a factor in use)
        target_modules=list(targets),
        base_model_name_or_path=model,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    with files.storing(directory, "write to"):
        config.save_pretrained(str(directory))
    written = files.read_json(directory / ADAPTER_CONFIG)  # peft keeps the targets as a set: equal saves, equal bytes
    files.write_json(directory / ADAPTER_CONFIG, {**written, "target_modules": sorted(targets)})
    tensors = {PEFT_PREFIX + name: tensor for name, tensor in weights.items()}
    files.write_tensors(directory, ADAPTER_STEM, tensors, shard_bytes=1 << 62)  # peft reads one file
    return files.seal(directory)


def read_adapter(path: str, lora: LoraSpec, weights: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The tensors of a PEFT directory, by the names of `weights`, for an adapter on `model`.

    Raises:
        StorageError: a file is absent or damaged.
        UserError: it is no plain LoRA adapter, or has another rank, alpha or other layers than this one.
    """
    directory = Path(path)
    config = files.read_json(directory / ADAPTER_CONFIG)
    for key, plain in PLAIN.items():
        if config.get(key) not in plain:
            raise UserError(
                f"{directory / ADAPTER_CONFIG}: {key} is {config.get(key)!r}; only plain LoRA adapters load, with "
                f"{plain[-1]!r}"
            )
    for key, here in (("r", lora.rank), ("lora_alpha", lora.alpha)):
        if config.get(key) != here:
            raise UserError(f"{directory}: {key} is {config.get(key)} there and {here} here; open a model like it")
    if not (directory / f"{ADAPTER_STEM}.safetensors").is_file():
        raise StorageError(f"{directory} has no {ADAPTER_STEM}.safetensors; adapters load from safetensors alone")
    found = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in files.read_tensors(directory, ADAPTER_STEM)}
    copies = {name: found.pop(name) for name in list(found) if ".lora_" not in name}
    _check_copies(directory, copies, model)
    _check_tensors(directory, found, weights)
    return found


def _check_copies(directory: Path, copies: Mapping[str, Tensor], model: Any) -> None:
    """Raise `UserError` where what peft saves beside an adapter on the output layer, a copy of that layer and of the
    embedding, is not the base's own: the adapter then belongs to another base."""
    base = {name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items()} if copies else {}
    for name, copy in copies.items():
        own = base.get(name.replace(".base_layer.", "."))
        if own is None or not torch.equal(own.to("cpu", copy.dtype), copy):
            raise UserError(
                f"{directory} also holds {name!r}, which is no part of an adapter and not the weight of this base; an "
                "adapter of another base, or of one whose embedding was trained, does not load"
            )


def _check_tensors(directory: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise `UserError` where the names or shapes of an adapter's tensors are not those of this one."""
    if found.keys() != expected.keys():
        raise UserError(
            f"{directory} is an adapter on other layers: {_ends(found)} there and {_ends(expected)} here; "
            f"{len(found.keys() ^ expected.keys())} tensors differ, first {min(found.keys() ^ expected.keys())!r}"
        )
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise UserError(
                f"{directory} is an adapter of another model: {name!r} has shape {tuple(tensor.shape)} there and "
                f"{tuple(expected[name].shape)} here"
            )


def _ends(names: Mapping[str, Tensor]) -> str:
    """The kinds of layers among tensor names, for messages."""
    return "+".join(sorted({name.rpartition(".lora_")[0].rpartition(".")[2] for name in names})) or "none"


# --- merged models ----------------------------------------------------------------------------------------


def write_merged(path: str, policy: Policy, tokenizer: Any, slot: str, dtype: torch.dtype) -> dict[str, str]:
    """Write base and adapter as one model directory to the empty directory `path`; digest by file name.

    An adapter on an output layer that is tied to the embedding unties them in what is written.

    Raises:
        StorageError: the directory is not empty or a file cannot be written.
    """
    directory = files.empty_directory(path)
    model = policy.model
    tensors = merged_tensors(model, slot, dtype)
    with files.storing(directory, "write to"):
        config = type(policy.config).from_dict(policy.config.to_dict())
        config.dtype = dtype
        config.architectures = [type(model).__name__]
        if _unties(model, slot):
            config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
        config.save_pretrained(directory)
        model.generation_config.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    files.write_tensors(directory, "model", tensors)
    return files.seal(directory)


@torch.no_grad()
def merged_tensors(model: Any, slot: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """W + (alpha / rank) B A, computed in float32, of adapted layers and every other float tensor as it is, as copies
    in `dtype` in host memory, by checkpoint name."""
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    left_out = set() if _unties(model, slot) else set(model.all_tied_weights_keys)
    state: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        name = key.replace(".base_layer.", ".")
        owner, _, leaf = name.rpartition(".")
        if name in left_out or not tensor.is_floating_point() or _is_factor(key, adapted):
            continue
        layer: Any = adapted.get(owner)
        if leaf == "weight" and layer is not None and slot in layer.lora_A:
            tensor = tensor.float() + layer.get_delta_weight(slot)
        state[name] = tensor.to("cpu", dtype, copy=True)
    return revert_weight_conversion(model, state)


def _is_factor(key: str, adapted: Mapping[str, Any]) -> bool:
    """Whether a tensor is an adapter's own."""
    return any(key[: key.find(mark)] in adapted for mark in (".lora_A.", ".lora_B.") if mark in key)


def _unties(model: Any, slot: str) -> bool:
    """Whether an adapter makes the output layer differ from an embedding that it shares weights with."""
    output = model.get_output_embeddings()
    return bool(model.all_tied_weights_keys) and isinstance(output, LoraLayer) and slot in output.lora_A
