"""Records on disk, background tasks, and model directories in several files."""

import asyncio
import logging
import sqlite3
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from rlorch.errors import DigestMismatchError, InvariantError, StorageError, UserError
from rlorch.service import promotion
from rlorch.service.records import FILE_NAME, Kind, Records
from rlorch.service.tasks import Tasks
from rlorch.weights import chain as chains
from rlorch.weights.codec import encode_update


@dataclass(frozen=True)
class Thing:
    """Something to keep."""

    size: int
    name: str = ""


THINGS, OTHERS = Kind("thing", Thing), Kind("other", Thing)


async def test_what_was_put_is_there_after_the_file_was_opened_again(tmp_path: Path) -> None:
    records = Records(tmp_path)
    await records.put(THINGS, "b/2", Thing(2))
    await records.put(THINGS, "b/1", Thing(1, "ö"))
    await records.put(THINGS, "a", Thing(3))
    await records.put(OTHERS, "b/1", Thing(9))
    await records.put(THINGS, "a", Thing(4))
    await records.delete(THINGS, "b/2")
    await records.delete(THINGS, "never")
    await records.close()
    await records.close()
    again = Records(tmp_path)
    assert again.list(THINGS) == {"a": Thing(4), "b/1": Thing(1, "ö")}
    assert again.list(THINGS, "b/") == {"b/1": Thing(1, "ö")}
    assert again.get(OTHERS, "b/1") == Thing(9)
    assert again.get(THINGS, "b/2") is None
    await again.close()


async def test_a_write_after_close_and_a_second_writer_are_refused(tmp_path: Path) -> None:
    records = Records(tmp_path)
    with pytest.raises(UserError, match="served already"):
        Records(tmp_path)
    await records.close()
    with pytest.raises(StorageError, match="after close"):
        await records.put(THINGS, "a", Thing(1))


async def test_a_file_of_another_program_or_a_newer_release_is_refused_and_let_go_of(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"not a database, but long enough to look like something" * 10)
    for _ in range(2):  # the second time the lock is free again
        with pytest.raises(StorageError, match="could not be opened"):
            Records(tmp_path)
    (tmp_path / FILE_NAME).unlink()
    connection = sqlite3.connect(tmp_path / FILE_NAME)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StorageError, match="newer"):
        Records(tmp_path)


async def test_a_record_that_another_release_wrote_differently_is_named(tmp_path: Path) -> None:
    records = Records(tmp_path)
    await records.put(THINGS, "a", Thing(1))
    with pytest.raises(StorageError, match="thing a cannot be read"):
        records.get(Kind("thing", int), "a")
    await records.close()


async def test_a_task_that_fails_ends_alone_and_close_ends_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    tasks = Tasks()
    await tasks.start()
    ended: list[str] = []

    async def fail() -> None:
        raise ValueError("oh")

    async def wait() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.append("waited")

    with caplog.at_level(logging.ERROR):
        await tasks.spawn("fails", fail())
    assert "fails failed" in caplog.text
    tasks.spawn("waits", wait())
    await asyncio.sleep(0)
    assert not ended
    await tasks.close()
    await tasks.close()
    assert ended == ["waited"]
    with pytest.raises(InvariantError):
        tasks.spawn("late", wait())


@pytest.mark.engine
@pytest.mark.parametrize("shard_bytes", [10, 30, 1 << 30])
def test_a_base_snapshot_becomes_safetensors_files_that_hold_its_bits(tmp_path: Path, shard_bytes: int) -> None:
    from safetensors import safe_open

    rng = np.random.default_rng(0)
    new = {
        f"w{i}": rng.integers(0, 1 << 15, shape, dtype=np.uint16) for i, shape in enumerate([(3, 5), (), (7,), (0, 2)])
    }
    manifest, payload = encode_update(
        version=1, kind="anchor", base_version=None, base=None, new=new, dtypes=dict.fromkeys(new, "BF16")
    )
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text('{"torch_dtype": "float32", "hidden_size": 3}')
    (source / "tokenizer.json").write_text("{}")
    (source / "model.safetensors").write_bytes(b"old")
    target = tmp_path / "models" / "new"
    promotion.write_base(source, manifest, payload, target, shard_bytes=shard_bytes)
    found = {}
    for path in target.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    assert found.keys() == new.keys()
    for name, bits in new.items():
        import torch

        np.testing.assert_array_equal(found[name].view(torch.uint16).numpy(), bits)
    assert (target / "model.safetensors.index.json").exists() == (shard_bytes < 1 << 30)
    assert '"dtype": "bfloat16"' in (target / "config.json").read_text()
    assert "torch_dtype" not in (target / "config.json").read_text()
    assert (target / "tokenizer.json").exists()
    with pytest.raises(DigestMismatchError):
        promotion.write_base(source, manifest, payload[:-1] + b"x", tmp_path / "models" / "bad")
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["new"]


def test_only_what_no_kept_version_was_made_against_is_unneeded() -> None:
    bits, live = {"w": np.zeros(4, np.uint16)}, []
    for version in range(1, 8):
        kind = "anchor" if version in (1, 4) else "delta"
        manifest, _ = encode_update(
            version=version, kind=kind, base_version=version - 1, base=bits, new=bits, dtypes={"w": "BF16"}
        )
        live.append(manifest)
    assert [one.version for one in chains.unneeded(live, {2})] == [3]
    assert [one.version for one in chains.unneeded(live, ())] == [1, 2, 3]
    assert chains.unneeded(live, {3, 99}) == []
    assert chains.unneeded([], {1}) == []
