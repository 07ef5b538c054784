"""Small models and random rows for the trainer's tests."""

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from rlorch.engine.tiny import make_tiny_model
from rlorch.types import Datum


def tiny_model(factory, seed=0):
    """Directory of a fresh tiny model."""
    directory = factory.mktemp("tiny") / "model"
    make_tiny_model(str(directory), seed)
    return str(directory)


def rows(seed, lengths, prompt=3, **extra):
    """Random datums whose first `prompt` predictions are masked out."""
    rng = np.random.default_rng(seed)
    datums = []
    for length in lengths:
        tokens = rng.integers(3, 100, length + 1)
        mask = (np.arange(length) >= min(prompt, length - 1)).astype(np.float32)
        inputs = {
            "target_tokens": tokens[1:],
            "logprobs": (mask * rng.normal(-4.8, 0.2, length)).astype(np.float32),
            "advantages": (mask * rng.normal()).astype(np.float32),
            "mask": mask,
        }
        datums.append(Datum(tokens[:-1], inputs | {key: make(rng, length) for key, make in extra.items()}))
    return datums


def plain_logprobs(directory, datums, model=None):
    """Target log-probs by the whole model, one unpadded row at a time, full logits; with gradient."""
    if model is None:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa")
    result = []
    for datum in datums:
        logits = model(input_ids=torch.tensor(datum.tokens_T)[None], use_cache=False).logits[0].float()
        targets = torch.tensor(datum.loss_inputs["target_tokens"])
        result.append(logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0])
    return model, result
