"""One local Ray cluster and one tiny model for all tests of this tier."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

REWARDS = '''
from rlorch.scoring import reward

@reward
def variety(rollout):
    """Distinct characters of the completion."""
    return len(set(rollout.text)) / 8
'''


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A local cluster with as many cores as tests here want at once."""
    from actors import runtime

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    runtime.connect(None)
    yield
    runtime.disconnect()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rlorch.engine.tiny import make_tiny_model

    directory = tmp_path_factory.mktemp("model")
    make_tiny_model(str(directory))
    return directory


@pytest.fixture(scope="session")
def rewards_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "ray_rewards.py"
    path.write_text(REWARDS)
    return path
