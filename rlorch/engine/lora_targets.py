"""Which linear layers of a model take adapters: found from the model itself, not from a table of architectures.

Every `nn.Linear` belongs to one part: the output layer is the unembedding; a layer whose path names attention
(`self_attn`, `attention`, `linear_attn`) is an attention projection; whatever else is linear in the body is
feed-forward, experts that are layers of their own included. Routers choose experts and take no adapter. Experts that
are slices of one tensor are no layers: an adapter on the feed-forward part of such a model is refused, because it would
silently leave them out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from rlorch.errors import UserError
from rlorch.specs import LoraSpec

ROUTERS = frozenset({"gate", "router", "shared_expert_gate", "moe_gate"})
ATTENTION = ("attn", "attention")


@dataclass(frozen=True, slots=True)
class LinearLayers:
    """Module names of a model's linear layers by part; `fused_experts` names a tensor that holds several experts."""

    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    unembed: tuple[str, ...]
    fused_experts: str | None
    others: frozenset[str]

    def chosen(self, lora: LoraSpec) -> tuple[str, ...]:
        """Names of the layers that an adapter is on.

        Raises:
            UserError: nothing is chosen, a chosen part has no linear layer, or its experts are fused.
        """
        if lora.train_mlp and self.fused_experts is not None:
            raise UserError(
                f"train_mlp: the experts of this model are one tensor ({self.fused_experts}), not linear layers, and "
                "take no adapter; set train_mlp to false"
            )
        parts: Mapping[str, tuple[bool, tuple[str, ...]]] = {
            "train_attn": (lora.train_attn, self.attention),
            "train_mlp": (lora.train_mlp, self.mlp),
            "train_unembed": (lora.train_unembed, self.unembed),
        }
        for key, (wanted, names) in parts.items():
            if wanted and not names:
                raise UserError(f"{key}: this model has no such linear layer; set {key} to false")
        found = tuple(name for wanted, names in parts.values() if wanted for name in names)
        if not found:
            raise UserError("an adapter on nothing: set train_attn, train_mlp or train_unembed")
        return found

    def patterns(self, chosen: Sequence[str]) -> list[str]:
        """The `target_modules` that mean exactly the chosen layers: the ends of their names, as other tools write
        them, or the whole names where an end would also mean another module."""
        ends = {name.rpartition(".")[2] for name in chosen}
        strangers = self.others.union(self.attention, self.mlp, self.unembed).difference(chosen)
        if any(name.rpartition(".")[2] in ends for name in strangers):
            return sorted(chosen)
        return sorted(ends)


def linear_layers(model: Any) -> LinearLayers:
    """The linear layers of a model that has no adapter yet, by part."""
    output = model.get_output_embeddings()
    attention: list[str] = []
    mlp: list[str] = []
    unembed: list[str] = []
    others: list[str] = []
    for name, module in model.named_modules():
        path = name.split(".")
        if module is output:
            unembed.append(name)
        elif not isinstance(module, nn.Linear) or path[-1] in ROUTERS:
            others.append(name)
        elif any(word in part for part in path for word in ATTENTION):
            attention.append(name)
        else:
            mlp.append(name)
    fused = (name for name, p in model.named_parameters() if p.ndim == 3 and "experts" in name)
    return LinearLayers(tuple(attention), tuple(mlp), tuple(unembed), next(fused, None), frozenset(others))
