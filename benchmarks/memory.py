"""Peak memory of one forward_backward against context length, with and without what bounds it, in one run.

Each cell is a fresh child process that trains one row of the given length on a small, deep model (random weights, a
vocabulary large enough for logits to matter) and reports how far its memory rose above what the loaded model takes: the
resident high-water mark on a CPU, the allocator's on a GPU. Gradients are counted; optimizer state is not there yet.

    chunked      log-probs 1024 positions at a time (trainer.logprob_chunk_tokens), the default
    whole        all logits at once
    + recompute  activations recomputed in the backward pass (trainer.activation_checkpointing)

Children take turns by length, so a busy machine slows them but changes no number.

    python -m benchmarks.memory [--contexts 1024 2048 4096] [--layers 12] [--vocab 16384] [--device cpu] [--json FILE]
"""

import argparse
import ctypes
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONTEXTS = [1024, 2048, 4096]
WHOLE = 1 << 30
SIDES = {
    "whole": (WHOLE, False),
    "chunked": (1024, False),
    "whole + recompute": (WHOLE, True),
    "chunked + recompute": (1024, True),
}
CHILD_TIMEOUT_S = 900.0
MIB = 2**20


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, help="tokens of the row")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="keep the numbers in this file")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        model, context, chunk, recompute = options.child
        print(json.dumps(measure(model, int(context), int(chunk), recompute == "True", options.device)))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, options.layers, options.width, options.vocab, max(options.contexts))
        found = {
            (side, context): run_child(folder, context, *settings, options.device)
            for context in options.contexts
            for side, settings in SIDES.items()
        }
    report(found, options)


def run_child(model: str, context: int, chunk: int, recompute: bool, device: str) -> float:
    """MiB that one forward_backward takes above the loaded model."""
    arguments = ["--device", device, "--child", model, str(context), str(chunk), str(recompute)]
    command = [sys.executable, "-m", "benchmarks.memory", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=CHILD_TIMEOUT_S, check=False)
    if done.returncode:
        raise SystemExit(f"context {context}: the child failed\n{done.stderr}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def report(found: dict[tuple[str, int], float], options: argparse.Namespace) -> None:
    """Print the table, and keep the numbers."""
    shape = f"{options.layers} layers of width {options.width}, vocabulary {options.vocab}, float32"
    print(f"peak MiB of one forward_backward above the loaded model ({shape}, {options.device})\n")
    print("context".ljust(9) + "".join(side.rjust(21) for side in SIDES))
    for context in options.contexts:
        whole = found["whole", context]
        cells = (f"{found[side, context]:.0f} ({found[side, context] / whole:.2f}x)" for side in SIDES)
        print(str(context).ljust(9) + "".join(cell.rjust(21) for cell in cells))
    if options.json:
        cells = [{"side": side, "context": context, "mib": mib} for (side, context), mib in found.items()]
        options.json.write_text(json.dumps({"machine": platform.platform(), "shape": shape, "cells": cells}, indent=1))


# --- the child --------------------------------------------------------------------------------------------


def make_model(directory: str, layers: int, width: int, vocab: int, max_tokens: int) -> None:
    """A Qwen3 with random weights and the tiny model's tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    from rlorch.engine.tiny import make_character_tokenizer

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        tie_word_embeddings=True,
        max_position_embeddings=max_tokens,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    make_character_tokenizer().save_pretrained(directory)


def measure(model: str, context: int, chunk: int, recompute: bool, device: str) -> float:
    """MiB above the loaded model at the worst moment of a forward_backward of one row."""
    import torch

    from rlorch.engine.trainer import TorchTrainer
    from rlorch.specs import TrainerSpec, WeightsSpec
    from rlorch.types import LossSpec

    spec = TrainerSpec(
        device=device,
        compute_dtype="float32",
        threads=1,
        micro_batch_tokens=context,
        logprob_chunk_tokens=chunk,
        activation_checkpointing=recompute,
    )
    trainer = TorchTrainer(model, spec, WeightsSpec())
    loss = LossSpec("cross_entropy")
    trainer.forward_backward([row(8)], loss)  # kernels and arenas that are made once
    trainer.drop()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        trainer.forward_backward([row(context)], loss)
        return (torch.cuda.max_memory_allocated() - before) / MIB
    ctypes.CDLL(None).malloc_trim(0)  # what loading freed would hide what training takes
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    trainer.forward_backward([row(context)], loss)
    return (resident("VmHWM") - before) / MIB


def row(length: int) -> Any:
    import numpy as np

    from rlorch.types import Datum

    tokens = np.random.default_rng(0).integers(3, 100, length + 1)
    return Datum(tokens[:-1], {"target_tokens": tokens[1:], "weights": np.ones(length, np.float32)})


def resident(key: str) -> int:
    """Bytes, from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


if __name__ == "__main__":
    main()
