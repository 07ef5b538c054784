"""Loading: files, overrides, defaults of sections, and messages that name place, key, value and fix."""

from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, model_validator

from rlorch.config import dump_config, dump_yaml, load_config
from rlorch.config.document import parse_document, parse_value
from rlorch.errors import ConfigError
from rlorch.specs import RewardSpec, RewardTerm, SamplerSpec, Spec


class Optimizer(Spec):
    """AdamW."""

    learning_rate: float = Field(1e-4, gt=0, description="peak")
    betas: tuple[float, float] = (0.9, 0.95)


class Window(Spec):
    """A checked pair."""

    low: int = 1
    high: int = 2

    @model_validator(mode="after")
    def _ordered(self) -> "Window":
        if self.low > self.high:
            raise ValueError(f"low {self.low} exceeds high {self.high}; swap them")
        return self


class Demo(Spec):
    """A demonstration config."""

    model: str = Field(description="directory of the model")
    steps: int = Field(10, ge=1, le=1000)
    kind: Literal["a", "b"] = "a"
    note: str | None = None
    optimizer: Optimizer = Optimizer(learning_rate=2e-4)
    rewards: RewardSpec = RewardSpec(terms=(RewardTerm(plugin="exact"), RewardTerm(plugin="length", weight=0.5)))
    sampler: SamplerSpec = SamplerSpec(max_model_len=64)
    window: Window = Window()
    tags: tuple[str, ...] = ()


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def failure(path: Path | None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(Demo, path, overrides)
    return str(caught.value)


def test_a_file_and_overrides_give_a_config(tmp_path: Path) -> None:
    path = write(tmp_path, "model: m\nsteps: 3\noptimizer:\n  learning_rate: 1e-5\n")
    config = load_config(Demo, path, ["steps=4", "note=two words", "optimizer.betas=[0.8, 0.9]"])
    assert (config.steps, config.note) == (4, "two words")
    assert config.optimizer == Optimizer(learning_rate=1e-5, betas=(0.8, 0.9))


def test_no_file_is_needed() -> None:
    assert load_config(Demo, None, ["model=m"]).model == "m"


def test_a_section_given_in_part_keeps_the_rest_of_its_own_default() -> None:
    config = load_config(Demo, None, ["model=m", "sampler.replicas=2", "optimizer.betas=[0, 0]"])
    assert (config.sampler.replicas, config.sampler.max_model_len) == (2, 64)
    assert config.optimizer.learning_rate == 2e-4


def test_a_list_item_of_the_default_can_be_overridden_and_one_appended() -> None:
    config = load_config(
        Demo, None, ["model=m", "rewards.terms.0.weight=2", "rewards.terms.2.plugin=math", "tags.0=x", "tags.1=y"]
    )
    assert [(term.plugin, term.weight) for term in config.rewards.terms] == [("exact", 2), ("length", 0.5), ("math", 1)]
    assert config.tags == ("x", "y")


def test_null_clears_a_key_and_later_overrides_win() -> None:
    config = load_config(Demo, None, ["model=m", "note=a", "note=null", "steps=2", "steps=5"])
    assert (config.note, config.steps) == (None, 5)


def test_an_override_value_may_hold_an_equals_sign() -> None:
    assert load_config(Demo, None, ["model=a=b"]).model == "a=b"


def test_every_problem_is_reported_with_its_line(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "steps: 0\nkind: c\nsampler:\n  replica: 2\n  engine: vlm\n"
        "rewards:\n  terms:\n    - plugin: exact\n      weight: x\n",
    )
    message = failure(path, "optimizer.learning_rate=-1")
    assert message.startswith("7 problems in the config:")
    assert f"{path}:1: steps = 0: must be an integer >= 1 and <= 1000" in message
    assert f"{path}:2: kind = 'c': must be one of a, b" in message
    assert f"{path}:4: sampler.replica: unknown key; did you mean sampler.replicas?" in message
    assert f"{path}:5: sampler.engine = 'vlm': must be one of auto, vllm, transformers" in message
    assert f"{path}:9: rewards.terms.0.weight = 'x': must be a number" in message
    assert "override 'optimizer.learning_rate=-1': optimizer.learning_rate = -1: must be a number > 0" in message
    assert "model: required, text (directory of the model)" in message


def test_an_unknown_key_points_to_the_section_that_has_it() -> None:
    assert "did you mean optimizer.learning_rate?" in failure(None, "model=m", "learning_rate=1e-4")
    assert "did you mean optimizer.learning_rate?" in failure(None, "model=m", "lerning_rate=1e-4")
    assert "known here: learning_rate, betas" in failure(None, "model=m", "optimizer.qqq=1")


def test_the_options_of_a_union_are_one_problem() -> None:
    message = failure(None, "model=m", "rewards.terms.0.options.k=[1]")
    assert message.startswith("1 problem")
    assert "rewards.terms.0.options.k = [1]: must be text or an integer or a number or true or false or null" in message


def test_a_check_of_a_section_names_the_section() -> None:
    assert "window = {'low': 3}: low 3 exceeds high 2; swap them" in failure(None, "model=m", "window.low=3")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("steps", "an override is key=value"),
        ("=3", "an override is key=value"),
        ("a..b=3", "has an empty part"),
        ("steps=[1", "is not valid YAML"),
        ("rewards.terms.5.weight=1", "is a list of 2: use an index from 0 to 2"),
        ("rewards.terms.x.weight=1", "is a list of 2"),
        ("model.x=1", "model is 'm', which has no keys below it"),
    ],
)
def test_a_malformed_override_says_what_is_wrong(override: str, words: str) -> None:
    message = failure(None, "model=m", override)
    assert words in message
    assert override in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\na: 2\n", ":2: a is given twice"),
        ("model: [1\n", "not valid YAML"),
        ("- a\n", ":1: a config is a mapping of keys to values, not a list"),
        ("just words\n", "not the value 'just words'"),
        ("1: x\n", ":1: the key 1 must be text"),
        ("? [a]\n: x\n", ":1: a key must be text, not a list"),
        ("model: &a\n  x: *a\n", "an alias that contains itself"),
        ("model: *nothing\n", "not valid YAML"),
        ("model: !!python/object:os.system {}\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_config_names_the_line(tmp_path: Path, text: str, words: str) -> None:
    message = failure(write(tmp_path, text))
    assert words in message
    assert "run.yaml" in message


def test_a_missing_file_and_a_directory_are_named(tmp_path: Path) -> None:
    assert f"there is no config file {tmp_path / 'no.yaml'}" in failure(tmp_path / "no.yaml")
    assert "is a directory" in failure(tmp_path)


def test_merge_keys_and_aliases_work(tmp_path: Path) -> None:
    path = write(tmp_path, "model: m\nsampler: &s {replicas: 2}\nwindow:\n  <<: {low: 0}\n  high: 1\n")
    assert load_config(Demo, path).window == Window(low=0, high=1)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1_000", 1000),
        ("017", 17),
        ("0x1F", 31),
        ("no", "no"),
        ("2024-01-01", "2024-01-01"),
        ("1:30", "1:30"),
        ("true", True),
        ("~", None),
        ("", None),
        (".inf", float("inf")),
        ("1.", 1.0),
        ("-.5", -0.5),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    parsed = parse_value(text, "it")
    assert parsed == value
    assert type(parsed) is type(value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_what_is_dumped_is_read_back_equal(data: dict[str, object]) -> None:
    assert parse_document(dump_yaml(data), "it").data == data


@settings(deadline=None)
@given(
    st.builds(
        Demo,
        model=st.text(),
        steps=st.integers(1, 1000),
        note=st.none() | st.text(),
        optimizer=st.builds(Optimizer, learning_rate=st.floats(0, exclude_min=True, allow_infinity=False)),
        tags=st.lists(st.text(), max_size=3).map(tuple),
    )
)
def test_a_dumped_config_loads_equal(tmp_path_factory: pytest.TempPathFactory, config: Demo) -> None:
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(Demo, path) == config


def test_an_override_of_an_alias_changes_one_place_only(tmp_path: Path) -> None:
    path = write(tmp_path, "model: m\nwindow: &w {low: 0}\nrewards:\n  terms:\n    - {plugin: a, options: *w}\n")
    config = load_config(Demo, path, ["window.low=1"])
    assert (config.window.low, config.rewards.terms[0].options) == (1, {"low": 0})
