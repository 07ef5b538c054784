"""Losses by name."""

from rlorch.errors import ConfigError
from rlorch.losses import cispo, cross_entropy, dppo, dro, gspo, importance_sampling, ppo, reinforce
from rlorch.losses.record import Loss, nearest

LOSSES: dict[str, Loss] = {
    module.LOSS.name: module.LOSS
    for module in (cross_entropy, importance_sampling, ppo, cispo, gspo, dro, reinforce, dppo)
}
"""Every loss. `Loss.configure` checks options, `Loss.required` and `Loss.optional` name the inputs."""


def find_loss(name: str) -> Loss:
    """The loss called `name`. Raises `ConfigError`, naming the nearest, when there is none."""
    loss = LOSSES.get(name)
    if loss is None:
        raise ConfigError(f"there is no loss {name!r}{nearest(name, LOSSES)}")
    return loss
