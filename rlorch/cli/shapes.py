"""`rlorch shapes`: the training shapes there are, and which of them fit on this machine or on a Ray cluster."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlorch.cli.machine import find_devices
from rlorch.placement import Devices
from rlorch.placement.devices import machine
from rlorch.shapes import Catalogue, TrainingShape

_HEAD = ("shape", "kind", "model", "GPUs", "context", "fits")


def list_shapes(files: Sequence[Path], address: str | None, *, as_json: bool, say: Callable[[str], None]) -> None:
    """Say a line per shape, or all of them as one JSON list.

    Raises:
        ConfigError: a catalogue file is wrong.
    """
    catalogue = Catalogue.load(*files)
    devices = _devices(address)
    if as_json:
        say(json.dumps([_record(catalogue, shape, devices) for shape in catalogue.list()], indent=2))
        return
    rows = [_HEAD, *(_row(catalogue, shape, devices) for shape in catalogue.list())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    say("\n".join([machine(devices), "", *lines]))


def _devices(address: str | None) -> Devices:
    if address is None:
        return find_devices()
    from rlorch.cli.runs import open_host

    with open_host("ray", address) as host:
        return host.devices


def _row(catalogue: Catalogue, shape: TrainingShape, devices: Devices) -> tuple[str, ...]:
    nodes = f"{shape.node_count} x " if shape.node_count > 1 else ""
    gpus = f"{nodes}{shape.accelerator_count} x {shape.accelerator_type}" if shape.num_gpus else "none"
    context = shape.max_supported_context_length
    tokens = f"{context // 1024}k" if context % 1024 == 0 else str(context)
    return shape.name, shape.kind, shape.base_model or "any", gpus, tokens, _verdict(catalogue, shape, devices)


def _verdict(catalogue: Catalogue, shape: TrainingShape, devices: Devices) -> str:
    if reasons := catalogue.fits(shape, devices):
        return f"no: {'; '.join(reasons)}"
    if reasons := catalogue.fits(shape, devices, with_deployment=True):
        return f"trainer alone: {'; '.join(reasons)}"
    return "yes"


def _record(catalogue: Catalogue, shape: TrainingShape, devices: Devices) -> dict[str, Any]:
    return {
        "name": shape.name,
        "version": shape.full_name(),
        "trainer_mode": shape.trainer_mode,
        "base_model": shape.base_model,
        "accelerator_type": shape.accelerator_type,
        "accelerator_count": shape.accelerator_count,
        "node_count": shape.node_count,
        "max_supported_context_length": shape.max_supported_context_length,
        "deployment_shape": shape.deployment.full_name() if shape.deployment else None,
        "trainer_misfits": catalogue.fits(shape, devices),
        "misfits": catalogue.fits(shape, devices, with_deployment=True),
        "source": shape.source,
    }
