"""Rank processes for the tests of distributed training, and the programs they run.

Processes are forked from a server that has imported torch and transformers once, so that a test pays milliseconds for
its ranks. Every wait has a deadline, after which all ranks are killed.
"""

import multiprocessing
import os
import time
from contextlib import suppress
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from trainer_builders import rows

from rlorch.engine.distributed import whole
from rlorch.engine.reference import TorchReference
from rlorch.engine.trainer import TorchTrainer
from rlorch.specs import Ranks, TrainerSpec, WeightsSpec
from rlorch.types import AdamParams, LossSpec

DEADLINE_S = 90.0
TIS = LossSpec("importance_sampling", {"tis_cap": 2.0})

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["rlorch.engine.trainer", "transformers.models.qwen3.modeling_qwen3"])


def run_ranks(world, program, directory, *args, deadline_s=DEADLINE_S):
    """What `program(ranks, *args)` returned on every rank; an exception in its place where it raised one, None where
    the process died. `directory` is where the ranks meet."""
    meeting = Path(directory) / f"meeting-{time.monotonic_ns()}"
    started = []
    for rank in range(world):
        ours, theirs = _context.Pipe(duplex=False)
        ranks = Ranks(rank=rank, world=world, init_method=f"file://{meeting}")
        process = _context.Process(target=_child, args=(theirs, program, ranks, args), daemon=True)
        process.start()
        theirs.close()
        started.append((process, ours))
    end = time.monotonic() + deadline_s
    results = []
    try:
        for rank, (_, pipe) in enumerate(started):
            if not pipe.poll(max(0.0, end - time.monotonic())):
                raise TimeoutError(f"rank {rank} of {world} did not answer within {deadline_s} s")
            try:
                results.append(pipe.recv())
            except EOFError:
                results.append(None)
    finally:
        for process, _ in started:
            process.kill()
            process.join()
    return results


def on_ranks(world, program, directory, *args, **options):
    """`run_ranks`, where all ranks must succeed; one rank runs here."""
    if world == 1:
        return [program(Ranks(), *args)]
    results = run_ranks(world, program, directory, *args, **options)
    for result in results:
        if isinstance(result, Exception):
            raise result
    assert None not in results, "a rank died"
    return results


def _child(pipe, program, ranks, args):
    try:
        result = program(ranks, *args)
    except Exception as error:
        result = error
    with suppress(BrokenPipeError):
        pipe.send(result)
    os._exit(0)  # no destructor may wait for ranks that are gone


# --- programs ---------------------------------------------------------------------------------------------


def open_trainer(ranks, model, **spec):
    options = {"device": "cpu", "threads": 1, "collective_timeout_s": 20.0, **spec}
    return TorchTrainer(model, TrainerSpec(ranks=ranks.world, **options), WeightsSpec(), ranks)


def state(trainer):
    """Whole weights and moments, as numpy: a collective."""
    tensors = dict(trainer._parameters) | trainer._learner.adamw.tensors()
    return {name: whole(tensor.detach()).cpu().numpy().copy() for name, tensor in tensors.items()}


def step(trainer, lengths, *, clip=0.0, calls=1, rate=2e-3):
    """`calls` forward_backward calls of random rows, then one step; all that was returned."""
    adam = AdamParams(rate, weight_decay=0.1, eps=1e-8, grad_clip_norm=clip)
    results = [trainer.forward_backward(rows(10 * trainer.version + call, lengths), TIS) for call in range(calls)]
    stepped = trainer.optim_step(adam, "num_loss_tokens")
    return [(result.logprobs, dict(result.metrics)) for result in results], dict(stepped.metrics)


def train(ranks, model, spec, steps):
    """(what each step returned, final state); `steps` are keyword arguments of `step`."""
    trainer = open_trainer(ranks, model, **spec)
    returned = [step(trainer, **options) for options in steps]
    final = state(trainer)
    held = {type(p) is not torch.nn.Parameter or isinstance(p.data, DTensor) for p in trainer._parameters.values()}
    scored = trainer.forward(rows(7, [9, 14, 3])).logprobs
    trainer.close()
    return returned, final, scored, held
