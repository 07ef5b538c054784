"""What a deployment's config leaves open comes from its shape, its trainer job and its model."""

import pytest

from rlorch.errors import ConfigError
from rlorch.service.deployment_specs import DEFAULT_MAX_LORAS, DEFAULT_MODEL_LEN, resolve
from rlorch.service.types import DeploymentConfig, JobConfig
from rlorch.shapes import Catalogue

SHAPE = Catalogue.load().get("qwen3p5-27b-256k").deployment


@pytest.mark.parametrize(("context", "length"), [(None, DEFAULT_MODEL_LEN), (512, 512), (1 << 20, DEFAULT_MODEL_LEN)])
def test_a_length_that_nobody_sets_is_the_models_or_the_default(context: int | None, length: int) -> None:
    config = resolve(DeploymentConfig("d", "m"), shape=None, model_context=context, job=None)
    assert (config.max_model_len, config.tensor_parallel) == (length, 1)


def test_a_length_beyond_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_model_len = 600, but the model ends at 512"):
        resolve(DeploymentConfig("d", "m", max_model_len=600), shape=None, model_context=512, job=None)


def test_a_shape_gives_what_it_owns_and_refuses_anything_else() -> None:
    assert SHAPE is not None
    config = DeploymentConfig("d", "m", deployment_shape=SHAPE.name)
    resolved = resolve(config, shape=SHAPE, model_context=None, job=None)
    assert resolved.tensor_parallel == SHAPE.tensor_parallel
    assert resolved.max_model_len == SHAPE.max_model_len
    assert resolved.gpu_memory_fraction == SHAPE.gpu_memory_fraction
    assert resolve(resolved, shape=SHAPE, model_context=None, job=None) == resolved
    with pytest.raises(ConfigError, match=r"tensor_parallel = 3, but the shape .* owns it"):
        resolve(
            DeploymentConfig("d", "m", deployment_shape=SHAPE.name, tensor_parallel=3),
            shape=SHAPE,
            model_context=None,
            job=None,
        )


@pytest.mark.parametrize(
    ("job", "max_loras"), [(None, DEFAULT_MAX_LORAS), (JobConfig("m"), 0), (JobConfig("m", max_lora_rank=128), 4)]
)
def test_adapters_are_served_unless_the_trainer_trains_all_weights(job: JobConfig | None, max_loras: int) -> None:
    config = resolve(DeploymentConfig("d", "m"), shape=None, model_context=None, job=job)
    assert config.max_loras == max_loras
    assert config.max_lora_rank >= (job.max_lora_rank if job else 0)
    asked = resolve(DeploymentConfig("d", "m", max_loras=2), shape=None, model_context=None, job=job)
    assert asked.max_loras == 2
