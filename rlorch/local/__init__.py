"""The engines behind the ports, one hop each, in this process: breakpoints work. Ray's actors wrap the same."""

from rlorch.local.host import LocalTrainerHost
from rlorch.local.roles import LocalReference, LocalSampler, LocalTrainer
from rlorch.local.runtime import LocalRuntime

__all__ = ["LocalReference", "LocalRuntime", "LocalSampler", "LocalTrainer", "LocalTrainerHost"]
