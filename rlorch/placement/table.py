"""A plan as people read it."""

from rlorch.placement.devices import Devices, machine
from rlorch.placement.plan import Assignment, Plan

_HEAD = ("process", "device", "cores", "threads", "node")
_NODE_CHARS = 12  # enough to tell nodes apart


def render(plan: Plan, devices: Devices) -> str:
    """The plan as a table for a terminal; a column that is empty in every row is left out."""
    rows = [_row(place, devices) for place in plan.assignments]
    used = [column for column in range(len(_HEAD)) if any(row[column] for row in rows)]
    table = [_HEAD, *rows]
    widths = {column: max(len(row[column]) for row in table) for column in used}
    lines = ["  ".join(row[column].ljust(widths[column]) for column in used).rstrip() for row in table]
    return "\n".join([machine(devices), "", *lines, *(f"note: {note}" for note in plan.notes)])


def _row(place: Assignment, devices: Devices) -> tuple[str, ...]:
    cores = f"{place.cpus:g}" if place.cpus else "shared"
    return place.name, _device(place, devices), cores, str(place.threads), (place.node or "")[:_NODE_CHARS]


def _device(place: Assignment, devices: Devices) -> str:
    if not place.gpus:
        return "cpu"
    name = next(gpu.name for gpu in devices.gpus if gpu.index == place.gpus[0])
    share = f" x {place.gpu_fraction:g}" if place.gpu_fraction < 1 else ""
    return f"gpu {','.join(map(str, place.gpus))} ({name}){share}"
