from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
from service_world import World


@pytest.fixture
async def world(tmp_path: Path) -> AsyncGenerator[World]:
    model_dir = tmp_path / "model"
    model_dir.mkdir()
    (model_dir / "config.json").write_text('{"max_position_embeddings": 512, "dtype": "float32"}')
    (model_dir / "tokenizer.json").write_text("{}")
    world = World(tmp_path / "data", model_dir)
    await world.start()
    yield world
    await world.service.close()
