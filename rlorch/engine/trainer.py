"""The policy trainer: all weights of one model in training, synchronous, in one thread.

Gradients and the optimizer are `rlorch.engine.learner`; this is what is around them: loading, publishing, files.

Invariants:
    - Master weights and Adam moments are float32; the compute dtype is autocast's. No dropout, no other chance.
    - A delta is made against the bits that were last *published*, not last exported: a publish that fails half-way
      leaves a base that every sampler still has.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rlorch.engine import files
from rlorch.engine.forward import score
from rlorch.engine.learner import Learner
from rlorch.engine.model import load_policy
from rlorch.engine.serving import Bits, bit_views, resolve_serve_dtype, serving_tensors
from rlorch.engine.tokenizer import load_tokenizer
from rlorch.engine.top_k import score_top_k
from rlorch.errors import StorageError, UserError, WeightsError
from rlorch.specs import TrainerSpec, WeightsSpec
from rlorch.types import AdamParams, Datum, ForwardResult, LossSpec, Manifest, Normalization, StepResult
from rlorch.weights.codec import encode_update

FORMAT = 1
"""Layout of what `save` writes."""
STATE_FILE = "trainer.json"


@dataclass(frozen=True, slots=True, eq=False)
class Exported:
    """Served bits of a version, by checkpoint name."""

    version: int
    bits: Mapping[str, Bits]


class TorchTrainer:
    """One policy in training. Synchronous: one caller at a time."""

    def __init__(self, model: str, spec: TrainerSpec, weights: WeightsSpec) -> None:
        """Load `model` as version 0.

        Raises:
            ModelError, PlacementError, ConfigError: see `load_policy`, `load_tokenizer`, `resolve_serve_dtype`.
        """
        if spec.threads is not None:
            torch.set_num_threads(spec.threads)
        torch.manual_seed(spec.seed)
        self._spec = spec
        self._zstd_level = weights.zstd_level
        self._serve_dtype = resolve_serve_dtype(spec.serve_dtype)
        self._tokenizer = load_tokenizer(model)
        self._policy = load_policy(
            model,
            device=spec.device,
            compute_dtype=spec.compute_dtype,
            activation_checkpointing=spec.activation_checkpointing,
        )
        self._parameters = dict(self._policy.model.named_parameters())
        self._learner = Learner(self._policy, spec, self._parameters)
        self._exported: Exported | None = None
        self._published: Exported | None = None

    @property
    def version(self) -> int:
        """Optimizer steps applied."""
        return self._learner.version

    # --- computing ------------------------------------------------------------------------------------------

    def forward(self, datums: Sequence[Datum], top_k: int = 0) -> ForwardResult:
        """Log-probabilities of every target under the current weights, and the `top_k` likeliest tokens of each
        position. Raises `UserError`."""
        if top_k:
            return score_top_k(self._policy, self._spec, datums, top_k)
        return ForwardResult(score(self._policy, self._spec, datums), {})

    def forward_backward(self, datums: Sequence[Datum], loss: LossSpec) -> ForwardResult:
        """See `Learner.forward_backward`."""
        return self._learner.forward_backward(datums, loss)

    def optim_step(self, adam: AdamParams, normalization: Normalization) -> StepResult:
        """See `Learner.optim_step`."""
        return self._learner.optim_step(adam, normalization)

    def drop(self) -> int:
        """See `Learner.drop`."""
        return self._learner.drop()

    # --- publishing -----------------------------------------------------------------------------------------

    def export(self, kind: str, number: int | None = None) -> tuple[Manifest, bytes]:
        """The current weights as an "anchor", or as a "delta" against the last published bits (an anchor when there
        are none, or when they have this very number). They are published as version `number`: by default the count of
        optimizer steps, which a run publishes once each. Idempotent."""
        if kind not in ("anchor", "delta"):
            raise UserError(f"export of kind {kind!r}; it must be anchor or delta")
        number = self.version if number is None else number
        bits, dtypes = bit_views(serving_tensors(self._policy.model, self._serve_dtype))
        base = self._published
        delta = kind == "delta" and base is not None and base.version < number
        manifest, payload = encode_update(
            version=number,
            kind="delta" if delta else "anchor",
            base_version=base.version if delta and base else None,
            base=base.bits if delta and base else None,
            new=bits,
            dtypes=dtypes,
            zstd_level=self._zstd_level,
        )
        self._exported = Exported(number, bits)
        return manifest, payload

    def published(self, version: int) -> None:
        """The head moved to the exported `version`: later deltas are against it. Idempotent.

        Raises:
            WeightsError: `version` is not what was exported last.
        """
        if self._exported is not None and self._exported.version == version:
            self._published, self._exported = self._exported, None
        elif self._published is None or self._published.version != version:
            held = None if self._exported is None else self._exported.version
            raise WeightsError(
                f"version {version} was published, but version {held} was exported last; export it again"
            )

    # --- files ----------------------------------------------------------------------------------------------

    def save(self, path: str) -> dict[str, str]:
        """Write weights, moments, version and generator state to the empty directory `path`, durably.

        Accumulated gradients are not saved.

        Returns:
            xxh3-128 hex digest of every file by name.

        Raises:
            StorageError: the directory is not empty or a file cannot be written.
        """
        directory = files.empty_directory(path)
        files.write_tensors(directory, "weights", self._state())
        files.write_tensors(directory, "optimizer", self._learner.adamw.tensors())
        files.write_tensors(directory, "generator", files.rng_tensors())
        digests = files.seal(directory)
        files.write_record(directory / STATE_FILE, {"format": FORMAT, "version": self.version, "files": digests})
        return files.seal(directory)

    def load(self, path: str, *, optimizer: bool = True) -> int:
        """Read what `save` wrote; returns the version. Idempotent.

        All files are verified before anything changes. Drops accumulated gradients and the published base, so that
        the next export is an anchor. Without `optimizer` the moments start anew; the version is the state's all the
        same.

        Raises:
            StorageError: a file is absent, damaged, or of another model; nothing was changed.
        """
        directory = Path(path)
        state = files.read_record(directory / STATE_FILE)
        if state.get("format") != FORMAT:
            raise StorageError(f"{directory / STATE_FILE}: format {state.get('format')!r}, this version reads {FORMAT}")
        files.verify(directory, state["files"])
        self._check_shapes(directory)
        live = self._state()
        with torch.no_grad():
            for name, tensor in files.read_tensors(directory, "weights"):
                live[name].copy_(tensor)
        self._learner.drop()
        self._learner.adamw.restore(files.read_tensors(directory, "optimizer") if optimizer else iter(()))
        files.restore_rng(dict(files.read_tensors(directory, "generator")))
        self._exported = self._published = None
        self._learner.version = int(state["version"])
        return self.version

    def save_pretrained(self, path: str) -> None:
        """Write a model directory in the serve dtype, tokenizer included, into the empty directory `path`.

        Raises:
            StorageError: the directory is not empty or a file cannot be written.
        """
        directory = files.empty_directory(path)
        with files.storing(directory, "write to"):
            config = type(self._policy.config).from_dict(self._policy.config.to_dict())
            config.dtype = self._serve_dtype
            config.architectures = [type(self._policy.model).__name__]
            config.save_pretrained(directory)
            self._policy.model.generation_config.save_pretrained(directory)
            self._tokenizer.save_pretrained(directory)
        files.write_tensors(directory, "model", serving_tensors(self._policy.model, self._serve_dtype))
        files.seal(directory)

    def _state(self) -> dict[str, torch.Tensor]:
        """Live tensors that `save` keeps: parameters and persistent buffers, tied ones once."""
        tied = set(self._policy.model.all_tied_weights_keys)
        return {name: tensor for name, tensor in self._policy.model.state_dict().items() if name not in tied}

    def _check_shapes(self, directory: Path) -> None:
        """Refuse a checkpoint of another model."""
        found = files.tensor_shapes(directory, "weights")
        expected = {name: tuple(tensor.shape) for name, tensor in self._state().items()}
        moments = files.tensor_shapes(directory, "optimizer")
        strangers = [name for name in moments if name.partition(".")[2] not in self._parameters]
        if found != expected or strangers:
            differing = [name for name in {**expected, **found} if found.get(name) != expected.get(name)] + strangers
            raise StorageError(
                f"{directory} is a checkpoint of another model: {len(differing)} tensors differ, first "
                f"{differing[0]!r} ({found.get(differing[0])} there, {expected.get(differing[0])} here)"
            )
