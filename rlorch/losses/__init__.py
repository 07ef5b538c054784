"""Policy-gradient and supervised losses with their corrections: pure functions over torch tensors.

`rlorch.losses.policy` has the formula that all policy losses share, `rlorch.losses.corrections` the off-policy
corrections, one file per family the rest; `LOSSES` finds them by name.
"""

from rlorch.losses.record import Loss, LossOutput, Option
from rlorch.losses.registry import LOSSES, find_loss

__all__ = ["LOSSES", "Loss", "LossOutput", "Option", "find_loss"]
