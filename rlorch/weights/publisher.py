"""Publishing: the trainer's weights become the head of the store.

    head of the store -> anchor or delta? -> trainer.export (bytes are durable) -> store.advance (the head moves, and
    the store deletes old chains) -> trainer.published (later deltas build on these bits) -> `head` wakes the syncers

Each step may fail or the process may die between any two: calling `publish` again carries on. It works because the
first two steps are idempotent, and because a head that already has the exported version and state digest needs
nothing but the last two.
"""

from rlorch.aio import Watched, deadline
from rlorch.errors import StaleHeadError
from rlorch.ports import Trainer, WeightStore
from rlorch.specs import WeightsSpec
from rlorch.types import Manifest, ManifestKind
from rlorch.weights.chain import describe, needs_anchor

EXPORT_TIMEOUT_S = 900.0
"""An anchor of 70B BF16 parameters at 0.2 GB/s, the slowest shared disk worth using, takes 700 s."""


class Publisher:
    """The only writer of a run's weight store. `head` is the last version known to be published."""

    def __init__(
        self, trainer: Trainer, store: WeightStore, spec: WeightsSpec, export_timeout_s: float = EXPORT_TIMEOUT_S
    ) -> None:
        self._trainer = trainer
        self._store = store
        self._spec = spec
        self._export_timeout_s = export_timeout_s
        self.head: Watched[Manifest | None] = Watched(None)

    async def publish(self) -> Manifest:
        """Make the trainer's current weights the head; returns their manifest. Idempotent.

        Raises:
            StaleHeadError: the store's head is as new as these weights, but other weights.
            StorageError: the store could not be read or written; nothing was lost, publish again.
            DeadlineError: the trainer or the store did not answer.
        """
        spec = self._spec
        async with deadline(
            spec.stage_timeout_s, "publisher: the weight store does not give its head; is its disk up?"
        ):
            head = await self._store.head()
            chain = await self._store.chain(head.version) if head else ()
        manifest = await self._export("anchor" if needs_anchor(chain, spec) else "delta")
        if manifest.kind == "delta" and not _follows(manifest, head) and not _same(manifest, head):
            manifest = await self._export("anchor")  # the trainer lost track of the head, as after a restore
        if _same(manifest, head):
            assert head is not None
            manifest = head
        else:
            await self._advance(head, manifest)
        what = f"publisher: the trainer does not acknowledge version {manifest.version}; restart it from a checkpoint"
        async with deadline(self._export_timeout_s, what):
            await self._trainer.published(manifest.version)
        self.head.set(manifest)
        return manifest

    async def _export(self, kind: ManifestKind) -> Manifest:
        what = f"publisher: the trainer does not finish exporting a {kind}; look at its log and the disk's speed"
        async with deadline(self._export_timeout_s, what):
            return await self._trainer.export(kind)

    async def _advance(self, head: Manifest | None, manifest: Manifest) -> None:
        if head is not None and manifest.version <= head.version:
            raise StaleHeadError(
                f"the trainer is at {describe(manifest)}, but the store's head is {describe(head)} with other weights: "
                "rewind the store to the checkpoint's version before a resumed run publishes"
            )
        what = f"publisher: the weight store does not move its head to version {manifest.version}; is its disk up?"
        async with deadline(self._spec.stage_timeout_s, what):
            await self._store.advance(head.version if head else None, manifest)


def _follows(manifest: Manifest, head: Manifest | None) -> bool:
    return head is not None and manifest.base_version == head.version


def _same(manifest: Manifest, head: Manifest | None) -> bool:
    return head is not None and (manifest.version, manifest.digest) == (head.version, head.digest)
