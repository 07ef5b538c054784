"""Where each role of a run goes: devices and specs in, a plan or the reasons why there is none out. Pure.

* No GPU: a sampler gets `sampler.threads` cores, the trainer the rest and at least one.
* One GPU: the trainer and one sampler share it; the sampler's memory fraction is lowered to what the trainer leaves.
* Several: the trainer has the first to itself (`trainer.ranks` of them, one per rank, on one node where one has that
  many), each sampler `tensor_parallel` of the others, on one node.
* The reference runs where the trainer runs. Reward workers reserve nothing.

Reservations always fit the machine, so that a scheduler can honour them: more roles than cores share them by
fractions and the plan says so. Memory is estimated from the number of parameters where that is known.
"""

from rlorch.placement.devices import Devices, Gpu
from rlorch.placement.memory import GIB, ModelSize, reference_bytes, sampler_bytes, trainer_bytes
from rlorch.placement.plan import Assignment, Plan, adjusted, make_plan
from rlorch.placement.table import render

__all__ = [
    "GIB",
    "Assignment",
    "Devices",
    "Gpu",
    "ModelSize",
    "Plan",
    "adjusted",
    "make_plan",
    "reference_bytes",
    "render",
    "sampler_bytes",
    "trainer_bytes",
]
