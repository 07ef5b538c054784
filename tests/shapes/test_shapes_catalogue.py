"""The catalogue: what ships, names and versions, files of the user's own, and what may be set beside a shape."""

import pickle
import re
import tomllib
from dataclasses import fields, replace
from pathlib import Path

import pytest

from rlorch.errors import ConfigError
from rlorch.shapes import (
    SHAPE_OWNED_FIELDS,
    USER_FIELDS,
    Catalogue,
    TrainingShapeProfile,
    check_overrides,
    host_layout,
)
from rlorch.shapes.shape import DEPLOYMENT_IMAGE_TAG, TRAINER_IMAGE_TAG

ROOT = Path(__file__).parents[2]
BUILTIN = Catalogue.load()
PUBLISHED = {  # name: (context, GPUs on all nodes, nodes)
    "qwen3p5-9b-256k": (262144, 2, 1),
    "qwen3p5-9b-256k-lora": (262144, 2, 1),
    "qwen3p5-9b-256k-forward-only": (262144, 2, 1),
    "qwen3p5-27b-256k": (262144, 4, 1),
    "qwen3p5-27b-256k-lora": (262144, 4, 1),
    "qwen3p5-27b-256k-forward-only": (262144, 2, 1),
    "qwen3p5-35b-a3b-256k": (262144, 8, 1),
    "qwen3p5-35b-a3b-256k-lora": (262144, 8, 1),
    "qwen3p5-35b-a3b-256k-forward-only": (262144, 4, 1),
    "qwen3p5-397b-a17b-256k": (262144, 32, 4),
    "qwen3p5-397b-a17b-256k-lora": (262144, 8, 1),
    "qwen3p5-397b-a17b-256k-forward-only": (262144, 8, 1),
    "gemma-4-31b-256k-b200": (262144, 4, 1),
    "gemma-4-31b-256k-b200-lora": (262144, 4, 1),
    "gemma-4-31b-256k-b200-forward-only": (262144, 4, 1),
    "gemma-4-26b-a4b-256k-b200": (262144, 4, 1),
    "gemma-4-26b-a4b-256k-b200-lora": (262144, 4, 1),
    "gemma-4-26b-a4b-256k-b200-forward-only": (262144, 4, 1),
    "llama70b-policy": (131072, 8, 1),
    "llama70b-forward-only": (131072, 4, 1),
    "kimi-2p5-text-only-256k": (262144, 64, 8),
    "kimi-2p5-text-only-256k-forward-only": (262144, 16, 2),
    "kimi-k2p5-text-only-256k-lora": (262144, 8, 1),
}
FAMILY = """
families:
  mine:
    accelerator_type: NVIDIA_H100_80GB
    max_context_length: 4096
    policy: {accelerator_count: 1}
"""


@pytest.fixture(autouse=True)
def no_catalogues_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RLORCH_SHAPES", raising=False)


def written(tmp_path: Path, text: str, name: str = "shapes.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


# --- what ships -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_shape_has_the_published_size(name: str) -> None:
    shape = BUILTIN.get(name)
    found = (shape.max_supported_context_length, shape.num_gpus, shape.node_count)
    assert found == PUBLISHED[name]
    assert shape.trainer_mode == (
        "LORA_TRAINER" if name.endswith("-lora") else "FORWARD_ONLY" if "forward-only" in name else "POLICY_TRAINER"
    )


def test_the_walkthroughs_shape_is_there() -> None:
    shape = BUILTIN.get("accounts/fireworks/trainingShapes/qwen3-8b-128k-h200")
    assert (shape.accelerator_type, shape.trainer_mode) == ("NVIDIA_H200_141GB", "POLICY_TRAINER")
    assert shape.max_supported_context_length == 131072


@pytest.mark.parametrize("name", ["cpu", "qwen3-tiny-cpu", "box-1gpu", "box-2gpu", "box-4gpu", "box-8gpu"])
def test_plain_boxes_come_in_all_three_kinds(name: str) -> None:
    kinds = [BUILTIN.get(name + suffix).kind for suffix in ("", "-lora", "-forward-only")]
    assert kinds == ["policy", "LoRA", "forward-only"]


def test_what_trains_is_served_and_what_only_looks_is_not() -> None:
    for shape in BUILTIN.list():
        assert (shape.deployment is None) == (shape.trainer_mode == "FORWARD_ONLY")
        if shape.deployment:
            assert shape.deployment.max_model_len == shape.max_supported_context_length


def test_the_runtime_versions_are_the_ones_that_are_pinned() -> None:
    constraints = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert f"torch-{constraints['torch']}" == TRAINER_IMAGE_TAG
    assert [f"vllm=={DEPLOYMENT_IMAGE_TAG.removeprefix('vllm-')}"] == extras["vllm"]


# --- names and versions -----------------------------------------------------------------------------------


def test_a_bare_name_any_account_and_the_current_version_mean_one_shape() -> None:
    shape = BUILTIN.get("qwen3p5-9b-256k")
    for ref in (
        "accounts/fireworks/trainingShapes/qwen3p5-9b-256k",
        "accounts/somebody-else/trainingShapes/qwen3p5-9b-256k",
        f"accounts/me/trainingShapes/qwen3p5-9b-256k/versions/{shape.version}",
        f"qwen3p5-9b-256k/versions/{shape.version}",
    ):
        assert BUILTIN.get(ref) is shape


def test_a_profile_has_the_fields_of_the_api_under_the_account_that_was_named() -> None:
    assert [field.name for field in fields(TrainingShapeProfile)] == [
        "training_shape_version",
        "trainer_image_tag",
        "max_supported_context_length",
        "node_count",
        "deployment_shape_version",
        "deployment_image_tag",
        "accelerator_type",
        "accelerator_count",
        "base_model_weight_precision",
        "pipeline_parallelism",
        "trainer_mode",
    ]
    profile = BUILTIN.resolve("accounts/me/trainingShapes/qwen3p5-397b-a17b-256k-lora")
    shape = BUILTIN.get("qwen3p5-397b-a17b-256k-lora")
    assert profile.training_shape == "accounts/me/trainingShapes/qwen3p5-397b-a17b-256k-lora"
    assert profile.training_shape_version == f"{profile.training_shape}/versions/{shape.version}"
    assert profile.deployment_shape == profile.deployment_shape_version
    assert profile.deployment_shape is not None
    assert BUILTIN.deployment(profile.deployment_shape) == shape.deployment
    assert (profile.accelerator_count, profile.node_count, profile.supports_lora) == (8, 1, True)
    assert BUILTIN.resolve(profile.training_shape_version) == profile


def test_a_forward_only_profile_has_no_deployment() -> None:
    profile = BUILTIN.resolve("llama70b-forward-only")
    assert (profile.deployment_shape, profile.deployment_shape_version) == (None, "")
    assert not profile.supports_lora


def test_a_version_is_what_a_shape_says_and_nothing_else() -> None:
    shape = BUILTIN.get("qwen3p5-9b-256k")
    assert replace(shape, source="elsewhere:1", siblings={}).version == shape.version
    assert shape.deployment is not None
    changed = [
        replace(shape, accelerator_count=4),
        replace(shape, max_supported_context_length=4096),
        replace(shape, trainer_image_tag="torch-9"),
        replace(shape, deployment=replace(shape.deployment, dtype="float16")),
    ]
    versions = {shape.version, *(other.version for other in changed)}
    assert len(versions) == 1 + len(changed)
    assert len({shape.version for shape in BUILTIN.list()}) == len(BUILTIN.list())


def test_another_version_is_refused_with_the_one_that_there_is() -> None:
    current = BUILTIN.get("cpu").version
    with pytest.raises(ConfigError, match=f"cpu has no version '0123456789ab'.*this catalogue's is {current}"):
        BUILTIN.resolve("accounts/me/trainingShapes/cpu/versions/0123456789ab")


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("qwen3p5-9b-265k", "did you mean qwen3p5-9b-256k or"),
        ("accounts/fireworks/trainingShapes/llama70b", "did you mean llama70b-policy"),
        ("zzzz", "`rlorch shapes` lists what there is"),
        ("accounts/fireworks/models/qwen3-8b", "is not the name of a shape"),
        ("accounts/fireworks/deploymentShapes/cpu", "is not the name of a shape"),
        ("../../etc/passwd", "is not the name of a shape"),
        ("", "is not the name of a shape"),
    ],
)
def test_an_unknown_name_gives_the_nearest_and_a_wrong_form_the_right_one(ref: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        BUILTIN.get(ref)
    assert message in str(caught.value)


def test_an_unknown_deployment_shape_gives_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no deployment shape 'box-3gpu'; near it are box-"):
        BUILTIN.deployment("box-3gpu")


def test_shapes_and_profiles_travel() -> None:
    for value in (BUILTIN.get("box-2gpu"), BUILTIN.resolve("box-2gpu")):
        assert pickle.loads(pickle.dumps(value)) == value


def test_a_host_has_one_rank_per_gpu_and_a_cpu_shape_none() -> None:
    assert host_layout(BUILTIN.get("qwen3p5-397b-a17b-256k")) == (32, 1.0, 1.0)
    assert host_layout(BUILTIN.get("box-4gpu-forward-only")) == (2, 0.2, 1.0)
    assert host_layout(BUILTIN.get("qwen3-tiny-cpu")) == (1, 0.0, 1.0)


# --- files of the user's own ------------------------------------------------------------------------------


def test_files_come_from_the_environment_and_from_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = written(tmp_path, FAMILY, "a.yaml")
    second = written(tmp_path, FAMILY.replace("mine", "yours"), "b.yaml")
    third = written(tmp_path, FAMILY.replace("mine", "theirs"), "c.yaml")
    monkeypatch.setenv("RLORCH_SHAPES", f"{first}:{second}")
    catalogue = Catalogue.load(third)
    assert [shape.name for shape in catalogue.list()[-3:]] == ["mine", "yours", "theirs"]
    assert catalogue.get("mine").source == f"{first}:6"
    assert len(catalogue.list()) == len(BUILTIN.list()) + 3


def test_the_example_of_the_documentation_is_a_catalogue(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "SHAPES.md").read_text().partition("```yaml\n")[2].partition("```")[0]
    catalogue = Catalogue.load(written(tmp_path, text))
    found = [(shape.name, shape.kind, shape.num_gpus) for shape in catalogue.list()[len(BUILTIN.list()) :]]
    assert found == [
        ("my-model-32k", "policy", 4),
        ("my-model-32k-lora", "LoRA", 1),
        ("my-model-32k-forward-only", "forward-only", 1),
    ]
    assert all(
        f"`{name}`" in (ROOT / "docs" / "SHAPES.md").read_text() for name in USER_FIELDS if "replica" not in name
    )


def test_a_built_in_name_cannot_be_taken_silently(tmp_path: Path) -> None:
    taken = FAMILY.replace("mine", "qwen3p5-9b-256k")
    path = written(tmp_path, taken)
    with pytest.raises(ConfigError) as caught:
        Catalogue.load(path)
    assert f"{path}:6: qwen3p5-9b-256k is taken, at {BUILTIN.get('qwen3p5-9b-256k').source}" in str(caught.value)
    assert "set replace: true" in str(caught.value)

    path.write_text(taken + "    replace: true\n")
    shape = Catalogue.load(path).get("qwen3p5-9b-256k")
    assert shape.accelerator_type == "NVIDIA_H100_80GB"
    assert shape.siblings["LORA_TRAINER"] == "qwen3p5-9b-256k-lora"


def test_two_files_and_two_families_cannot_give_one_name(tmp_path: Path) -> None:
    first, second = written(tmp_path, FAMILY, "a.yaml"), written(tmp_path, FAMILY, "b.yaml")
    with pytest.raises(ConfigError, match=rf"mine is taken, at {first}:6"):
        Catalogue.load(first, second)
    twice = FAMILY + FAMILY.replace("families:\n", "").replace("  mine:", "  other:").replace(
        "{acc", "{name: mine, acc"
    )
    path = written(tmp_path, twice)
    with pytest.raises(ConfigError, match="mine is given twice, first at"):
        Catalogue.load(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("policy:", "polcy:", ":6: families.mine.polcy: unknown key; did you mean families.mine.policy?"),
        ("4096", "lots", ":5: families.mine.max_context_length = 'lots': must be an integer >= 2"),
        ("    max_context_length: 4096\n", "", ":3: families.mine.max_context_length: required, an integer >= 2"),
        ("count: 1", "count: 0", ":6: families.mine.policy: accelerator_count: required, GPUs per node"),
        ("count: 1", "count: 2, ranks: 3", ":6: families.mine.policy: ranks = 3: a rank has one GPU"),
        ("count: 1", "count: 2, tensor_parallel: 2", "splits its work over ranks (FSDP2) only; must be 1"),
        ("count: 1", "count: 2, node_count: 2, gpu_fraction: 0.5", "gpu_fraction = 0.5: only on one node"),
        ("NVIDIA_H100_80GB", "H100", "accelerator_type = 'H100': must be CPU, ANY_GPU, or a type that ends in its"),
        ("NVIDIA_H100_80GB", "CPU", ":6: families.mine.policy: accelerator_count = 1: a CPU shape has no accelerators"),
        ("mine:", "Mine_1:", ":6: families.Mine_1.policy: 'Mine_1' is not a name"),
        ("    policy: {accelerator_count: 1}\n", "", ":3: families.mine: has none of policy, lora and forward_only"),
        ("{accelerator_count: 1}", "{accelerator_count: 1", "not valid YAML"),
        ("families:", "famlies:", "famlies: unknown key; did you mean families?"),
    ],
)
def test_a_malformed_file_is_explained_by_file_and_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in FAMILY
    path = written(tmp_path, FAMILY.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        Catalogue.load(path)
    assert message in str(caught.value)
    assert re.search(rf"{path}:\d+: ", str(caught.value))


def test_all_problems_of_a_file_come_at_once(tmp_path: Path) -> None:
    path = written(tmp_path, FAMILY.replace("4096", "1").replace("NVIDIA_H100_80GB", "3"))
    with pytest.raises(ConfigError, match="2 problems in the shape catalogue"):
        Catalogue.load(path)


def test_a_file_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLORCH_SHAPES", "/nowhere/shapes.yaml")
    with pytest.raises(ConfigError, match=r"/nowhere/shapes\.yaml"):
        Catalogue.load()


# --- what may be set beside a shape -----------------------------------------------------------------------


def test_what_is_the_users_may_be_set() -> None:
    given = dict.fromkeys(USER_FIELDS, "x") | {"lora_rank": 0}
    check_overrides(BUILTIN.get("qwen3p5-9b-256k"), given)
    check_overrides(BUILTIN.get("qwen3p5-9b-256k-lora"), given | {"lora_rank": 8})
    check_overrides(BUILTIN.get("cpu"), {"purpose": "x", "accelerator_type": None})


@pytest.mark.parametrize("name", SHAPE_OWNED_FIELDS)
def test_what_the_shape_owns_is_refused_by_name_with_what_to_do(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_overrides(BUILTIN.get("qwen3p5-9b-256k"), {name: "mine"})
    assert "training shape qwen3p5-9b-256k owns" in str(caught.value)
    assert f"{name} = 'mine'" in str(caught.value)
    assert "leave it out" in str(caught.value)


def test_the_linked_deployment_shape_may_be_named_and_no_other() -> None:
    shape = BUILTIN.get("qwen3p5-9b-256k")
    linked = BUILTIN.resolve("accounts/me/trainingShapes/qwen3p5-9b-256k").deployment_shape
    assert linked is not None
    check_overrides(shape, {"deployment_shape": linked})
    check_overrides(shape, {"deployment_shape": linked.partition("/versions/")[0]})
    with pytest.raises(ConfigError, match="the linked one is accounts/me/deploymentShapes/qwen3p5-9b-256k/versions/"):
        check_overrides(shape, {"deployment_shape": "accounts/me/deploymentShapes/cpu"})
    with pytest.raises(ConfigError, match="serves nothing"):
        check_overrides(BUILTIN.get("cpu-forward-only"), {"deployment_shape": linked})


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("qwen3p5-9b-256k", {"lora_rank": 8}, "trains no adapter; set 0, or use qwen3p5-9b-256k-lora"),
        ("kimi-2p5-text-only-256k", {"lora_rank": 8}, "or use kimi-k2p5-text-only-256k-lora"),
        ("kimi-k2p5-text-only-256k-lora", {"lora_rank": 0}, "set its rank, or use kimi-2p5-text-only-256k"),
        ("llama70b-policy", {"lora_rank": 8}, "there is no such shape for llama70b"),
        ("cpu-forward-only", {"lora_rank": 8}, "a forward-only shape trains no adapter; set 0, or use cpu-lora"),
        ("llama70b-policy", {"forward_only": True}, "or use llama70b-forward-only"),
        ("cpu-lora", {"lora_rank": -1}, "must be 0 (all weights) or the rank"),
    ],
)
def test_a_kind_that_disagrees_names_the_right_shape(name: str, given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_overrides(BUILTIN.get(name), given)
    assert message in str(caught.value)


def test_everything_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        check_overrides(BUILTIN.get("cpu"), {"accelerator_count": 8, "node_count": 2, "lora_rank": 4})
    assert len(str(caught.value).splitlines()) == 4
