import asyncio
from typing import Any, cast

import pytest
from weights_world import SPEC, StepTrainer, chain_of, manifest_of, publish_all

from rlorch.errors import DeadlineError, StaleHeadError, StorageError
from rlorch.ports import Trainer
from rlorch.sim.loop import run_virtual
from rlorch.types import Manifest
from rlorch.weights.publisher import Publisher
from rlorch.weights.store import MemoryWeightStore


def publisher_of(trainer: StepTrainer) -> Publisher:
    return Publisher(cast(Trainer, trainer), trainer.store, SPEC)


async def publish_versions(trainer: StepTrainer, publisher: Publisher, *versions: int) -> list[Manifest]:
    published = []
    for trainer.version in versions:
        published.append(await publisher.publish())
    return published


async def test_versions_are_anchors_and_deltas_as_the_spec_asks() -> None:
    trainer = StepTrainer(MemoryWeightStore())
    publisher = publisher_of(trainer)
    published = await publish_versions(trainer, publisher, *range(10))
    assert [manifest.kind for manifest in published] == (["anchor"] + ["delta"] * 3) * 2 + ["anchor", "delta"]
    assert await trainer.store.head() == publisher.head.value == published[-1]


async def test_publishing_the_same_version_again_changes_nothing() -> None:
    trainer = StepTrainer(MemoryWeightStore())
    publisher = publisher_of(trainer)
    first = await publisher.publish()
    assert await publisher.publish() == first
    trainer.version = 1
    second = await publisher.publish()
    assert await publisher.publish() == second
    assert len(cast(MemoryWeightStore, trainer.store).live) == 2


class FlakyStore(MemoryWeightStore):
    """Fails once, at one named moment."""

    moment = ""

    def fault(self, now: str) -> None:
        if now == self.moment:
            self.moment = ""
            raise StorageError(f"injected {now}")

    async def head(self) -> Manifest | None:
        self.fault("head")
        return await super().head()

    async def chain(self, version: int) -> tuple[Manifest, ...]:
        self.fault("chain")
        return await super().chain(version)

    async def advance(self, expected: int | None, new: Manifest) -> None:
        self.fault("before advance")
        await super().advance(expected, new)
        self.fault("after advance")


MOMENTS = [
    "head", "chain", "before export", "after export", "before advance", "after advance", "before published",
    "after published",
]  # fmt: skip


@pytest.mark.parametrize("forgets", [False, True], ids=["same publisher", "new process"])
@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_publish_that_failed_anywhere_is_finished_by_the_next(moment: str, forgets: bool) -> None:
    store = FlakyStore()
    trainer = StepTrainer(store, fault=store.fault)
    publisher = publisher_of(trainer)
    await publish_versions(trainer, publisher, 0, 1)
    trainer.version, store.moment = 2, moment
    with pytest.raises(StorageError, match=moment):
        await publisher.publish()
    if forgets:
        publisher, trainer.base = publisher_of(trainer), None
    manifest = await publisher.publish()
    assert manifest == await store.head() == publisher.head.value
    assert [m.version for m in store.live] == [0, 1, 2]
    assert trainer.base == 2
    assert (await publish_versions(trainer, publisher, 3))[0].base_version == 2


async def test_a_trainer_whose_base_is_not_the_head_is_asked_for_an_anchor() -> None:
    trainer = StepTrainer(MemoryWeightStore())
    publisher = publisher_of(trainer)
    await publish_versions(trainer, publisher, 0, 1)
    trainer.base = 0
    (manifest,) = await publish_versions(trainer, publisher, 2)
    assert manifest.kind == "anchor"
    assert trainer.calls[-3:] == ["export delta", "export anchor", "published 2"]


async def test_a_head_with_other_weights_of_the_same_or_a_newer_version_is_an_error() -> None:
    store = MemoryWeightStore()
    await publish_all(store, chain_of(0, 1))
    with pytest.raises(StaleHeadError, match="rewind"):
        await publisher_of(StepTrainer(store, version=1, seed=5)).publish()
    with pytest.raises(StaleHeadError, match="rewind"):
        await publisher_of(StepTrainer(store, version=0)).publish()


async def test_a_resumed_trainer_with_the_heads_weights_carries_on_from_it() -> None:
    store = MemoryWeightStore()
    await publish_all(store, chain_of(0, 1))
    trainer = StepTrainer(store, version=1)
    publisher = publisher_of(trainer)
    assert (await publisher.publish()).kind == "delta", "the head is what it was"
    assert (await publish_versions(trainer, publisher, 2))[0].base_version == 1


async def test_a_rival_that_publishes_in_between_is_noticed() -> None:
    store = MemoryWeightStore()
    trainer = StepTrainer(store)
    publisher = publisher_of(trainer)
    await publisher.publish()
    rival = manifest_of(1, 0, seed=0)

    def interfere(moment: str) -> None:
        if moment == "after export":
            store.payloads[rival[0].payload] = rival[1]
            store.live.append(rival[0])

    trainer.version, trainer.seed, trainer.fault = 1, 3, interfere
    with pytest.raises(StaleHeadError, match="Another trainer"):
        await publisher.publish()
    assert publisher.head.value is not None
    assert publisher.head.value.version == 0


@pytest.mark.parametrize("phase", ["export", "published"])
def test_a_silent_trainer_ends_in_a_deadline_that_says_what_to_do(phase: str) -> None:
    class Silent(StepTrainer):
        async def export(self, kind: str) -> Manifest:
            if phase == "export":
                await asyncio.Event().wait()
            return await super().export(kind)

        async def published(self, version: int) -> None:
            await asyncio.Event().wait()

    async def world() -> Any:
        with pytest.raises(DeadlineError, match=r"publisher: .*(export|version 0).*; (look|restart)"):
            await publisher_of(Silent(MemoryWeightStore())).publish()

    run_virtual(world())


async def test_publishing_wakes_whoever_watches_the_head() -> None:
    trainer = StepTrainer(MemoryWeightStore())
    publisher = publisher_of(trainer)
    async with asyncio.TaskGroup() as group:
        woken = group.create_task(publisher.head.until(lambda head: head is not None and head.version == 1))
        await publish_versions(trainer, publisher, 0, 1)
    assert woken.result() == await trainer.store.head()
