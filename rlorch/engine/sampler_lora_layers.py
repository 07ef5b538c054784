"""LoRA in a transformers model whose batch mixes adapters: added behind each linear layer, to the rows concerned.

The layers stay what they are, so that weight updates find their parameters by the same names: a forward hook adds
`x A^T B^T` of each adapter to the outputs of its rows. A row without an adapter is never touched.

B rows, T tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlorch.engine.sampler_lora import Adapter


class LoraLayers:
    """The adapters of one model. Hooks every `nn.Linear`, the head included."""

    def __init__(self, model: nn.Module) -> None:
        self._adapters: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        self._groups: list[tuple[Mapping[str, tuple[Tensor, Tensor]], Tensor]] = []
        self._linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        self._device = next(model.parameters()).device
        for name, module in self._linears.items():
            module.register_forward_hook(partial(self._add_to, name))

    @property
    def targets(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of each layer."""
        return {name: (module.out_features, module.in_features) for name, module in self._linears.items()}

    def add(self, adapter: Adapter) -> None:
        """Move an adapter beside the layers it changes, in their dtype, scaled."""
        held: dict[str, tuple[Tensor, Tensor]] = {}
        for name, (a, b) in adapter.layers.items():
            weight = self._linears[name].weight
            held[name] = (a.to(weight), (b.float() * adapter.scaling).to(weight))
        self._adapters[adapter.name] = held

    def remove(self, name: str) -> None:
        """Free an adapter; unknown names are ignored."""
        self._adapters.pop(name, None)

    @contextmanager
    def rows(self, adapters_B: Sequence[str | None]) -> Iterator[None]:
        """Forward passes in here have these adapters, one per row; None is the base."""
        groups: dict[str, list[int]] = {}
        for row, adapter in enumerate(adapters_B):
            if adapter is not None:
                groups.setdefault(adapter, []).append(row)
        self._groups = [
            (self._adapters[name], torch.tensor(rows, device=self._device)) for name, rows in groups.items()
        ]
        try:
            yield
        finally:
            self._groups = []

    def _add_to(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output_BTD: Tensor) -> None:
        for layers, rows in self._groups:
            if (layer := layers.get(name)) is None:
                continue
            a, b = layer
            output_BTD[rows] += nn.functional.linear(nn.functional.linear(inputs[0][rows], a), b)
