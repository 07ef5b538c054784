"""Bases, adapters and slow references for the tests of LoRA training."""

import warnings

import peft
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlorch.engine.lora import LoraBase
from rlorch.specs import LoraSpec, TrainerSpec
from rlorch.types import AdamParams, LossSpec

TIS = LossSpec("importance_sampling", {"tis_cap": 2.0})
ADAM = AdamParams(1e-2, weight_decay=0.1, grad_clip_norm=1.0)
SMALL = LoraSpec(rank=4, alpha=8)
LARGE = LoraSpec(rank=16, alpha=32, seed=5, train_mlp=False)


def lora_base(directory, **spec):
    return LoraBase(directory, TrainerSpec(threads=1, **spec))


def train(engine, datums, steps=1):
    for _ in range(steps):
        engine.forward_backward(datums, TIS)
        engine.optim_step(ADAM, "num_loss_tokens")


def bits(engine):
    """Copies of an adapter's weights and moments."""
    moments = engine._learner.adamw.tensors()
    return {n: t.detach().clone() for n, t in {**engine._parameters, **moments}.items()}


def gradients(engine):
    return {n: None if p.grad is None else p.grad.clone() for n, p in engine._parameters.items()}


def same_bits(a, b):
    return a.keys() == b.keys() and all(
        (x is None and y is None) or (x is not None and y is not None and torch.equal(x, y))
        for x, y in ((a[name], b[name]) for name in a)
    )


def base_model(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa")


def peft_model(directory, adapter, trainable=False):
    """Plain transformers and peft, which know nothing of rlorch."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        return peft.PeftModel.from_pretrained(base_model(directory), adapter, is_trainable=trainable)


def stored(path):
    return load_file(f"{path}/adapter_model.safetensors")
