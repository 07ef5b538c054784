"""What the machine has, what a model weighs, and the lines of `rlorch check`."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest

from rlorch.cli.check import Finding, findings, package, parse_requirement, report, satisfies
from rlorch.cli.machine import available_memory_bytes, count_cores, memory_bytes, model_size, parse_gpus
from rlorch.errors import ModelError
from rlorch.placement import ModelSize

LISTING = "0, GPU-aaa, NVIDIA H100, 81559\n1, GPU-abb, NVIDIA H100, 81559\n2, GPU-ccc, NVIDIA A10, 23028\n"


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["NVIDIA H100", "NVIDIA H100", "NVIDIA A10"]),
        ("2,0", ["NVIDIA A10", "NVIDIA H100"]),
        ("GPU-c", ["NVIDIA A10"]),
        ("", []),
        ("-1", []),
        ("0,9,1", ["NVIDIA H100"]),
    ],
)
def test_gpus_are_numbered_as_cuda_numbers_the_visible_ones(visible: str | None, names: list[str]) -> None:
    gpus = parse_gpus(LISTING, visible)
    assert [gpu.name for gpu in gpus] == names
    assert [gpu.index for gpu in gpus] == list(range(len(names)))


def test_gpu_memory_is_in_gib_and_an_odd_listing_gives_no_gpu() -> None:
    assert parse_gpus(LISTING, "2")[0].memory_gib == pytest.approx(22.5, abs=0.1)
    assert parse_gpus("No devices were found\n", None) == ()
    assert parse_gpus("0, GPU-aaa, NVIDIA GB10, [N/A]\n", None) == ()


def test_cores_and_memory_are_positive_and_consistent() -> None:
    assert count_cores() >= 1
    available = available_memory_bytes()
    assert available is None or 0 < available <= memory_bytes()


def write_model(folder: Path, config: Mapping[str, object], **shapes: list[int]) -> Path:
    header = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    encoded = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_model_is_weighed_from_file_headers(tmp_path: Path) -> None:
    config = {
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "hidden_size": 64,
        "vocab_size": 9,
    }
    folder = write_model(tmp_path, config, embed=[9, 64], norm=[64], scale=[])
    assert model_size(str(folder)) == ModelSize(9 * 64 + 64 + 1, 2 * 4 * 2 * 8 * 2, 9)


def test_a_hub_id_has_no_known_size() -> None:
    assert model_size("Qwen/Qwen3-0.6B") is None


def test_damaged_model_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"model.safetensors is not a safetensors file .* Git LFS pointer"):
        model_size(str(tmp_path))
    write_model(tmp_path, {}, a=[1])
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config.json"):
        model_size(str(tmp_path))


@pytest.mark.parametrize(
    ("installed", "wanted", "fits"),
    [
        ("2.60.0", ">=2.60", True),
        ("2.9", ">=2.60", False),
        ("2.13.0+cpu", ">=2.11", True),
        ("0.32.0", "==0.32.0", True),
        ("0.32.0.post1", "==0.32.0", True),
        ("0.32.1", "==0.32.0", False),
        ("1.5", ">=1.2,<2", True),
        ("3", "", True),
    ],
)
def test_versions_are_compared_by_number(installed: str, wanted: str, fits: bool) -> None:
    assert satisfies(installed, wanted) == fits


def test_requirements_are_read_without_extras_and_markers() -> None:
    assert parse_requirement("ray[default]>=2.60") == ("ray", ">=2.60")
    assert parse_requirement("vllm==0.32.0; extra == 'vllm'") == ("vllm", "==0.32.0")
    assert parse_requirement("numpy") == ("numpy", "")


def test_a_missing_or_old_package_fails_with_the_command_that_fixes_it() -> None:
    assert package("no-such-package-here", ">=1").fix == "pip install 'no-such-package-here>=1'"
    old = package("pydantic", ">=99")
    assert (old.status, old.fix) == ("fail", "pip install 'pydantic>=99'")
    assert package("pydantic", ">=2").status == "ok"


def test_a_finding_is_one_line_with_its_fix() -> None:
    assert str(Finding("warn", "cores", "1", "add some")) == "warn  cores          1  ->  add some"


@pytest.mark.engine
def test_the_report_covers_versions_engine_devices_and_space() -> None:
    names = [finding.name for finding in findings(with_ray=False, with_engine=False)]
    for name in ("python", "torch", "transformers", "ray", "tinker", "engine", "cores", "gpu", "memory", "disk"):
        assert name in names


@pytest.mark.engine
def test_the_exit_code_is_1_exactly_when_something_fails() -> None:
    said: list[str] = []
    code = report(with_ray=False, with_engine=False, say=said.append)
    assert code == int(any(line.startswith("fail") for line in said))


@pytest.mark.engine
def test_the_engine_test_runs_a_real_engine() -> None:
    tested = [f for f in findings(with_ray=False, with_engine=True) if f.name == "engine test"]
    assert [f.status for f in tested] == ["ok"], tested
