"""Training shapes: a name for the hardware and the layout that one kind of training of one model takes.

A user picks a name (`qwen3p5-9b-256k-lora`); the shape owns everything below it: accelerators, nodes, ranks, context
length, precision, runtime versions, and the deployment shape that serves what it trains. Names and fields are those of
the Fireworks Training API, whose public catalogue ships as `builtin.yaml`, beside shapes for plain boxes and for CPU.

Invariants: a version is a hash of what the shape says, so equal versions mean equal shapes, on any machine; a file of
the user's own never changes a built-in name unless it says so; what a shape owns cannot be set beside it.

Everything but `load` is pure.
"""

from rlorch.shapes.catalogue import Catalogue
from rlorch.shapes.fit import host_layout
from rlorch.shapes.names import DEFAULT_ACCOUNT
from rlorch.shapes.overrides import SHAPE_OWNED_FIELDS, USER_FIELDS, check_overrides
from rlorch.shapes.shape import DeploymentShape, Layout, TrainerMode, TrainingShape, TrainingShapeProfile

__all__ = [
    "DEFAULT_ACCOUNT",
    "SHAPE_OWNED_FIELDS",
    "USER_FIELDS",
    "Catalogue",
    "DeploymentShape",
    "Layout",
    "TrainerMode",
    "TrainingShape",
    "TrainingShapeProfile",
    "check_overrides",
    "host_layout",
]
