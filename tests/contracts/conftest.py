"""What the suites that also run over Ray share: a cluster, and a tiny model."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A local Ray cluster, the one that is there where another tier has started it."""
    from actors import runtime

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    runtime.connect(None)
    yield
    runtime.disconnect()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rlorch.engine.tiny import make_tiny_model

    directory = tmp_path_factory.mktemp("tiny-model")
    make_tiny_model(str(directory))
    return directory
