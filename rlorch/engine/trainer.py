"""The policy trainer: weights, gradients, optimizer and version, synchronous, in one thread.

Invariants:
    - Master weights and Adam moments are float32; the compute dtype is autocast's. No dropout, no other chance.
    - Gradients are *sums*: those of several `forward_backward` calls add up until `optim_step`, which divides them by
      what its normalisation counts, clips, and steps. On a CPU equal calls give equal bits.
    - A call that is refused (`UserError`) changed nothing. One that fails half-way spoils the accumulated gradient:
      it is dropped, and the next `optim_step` says so instead of stepping with a part.
    - A delta is made against the bits that were last *published*, not last exported: a publish that fails half-way
      leaves a base that every sampler still has.

B rows, T tokens of a row, N selected positions of a micro-batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlorch.engine import files
from rlorch.engine.adamw import AdamW
from rlorch.engine.collate import MicroBatch, lay_out, micro_batches
from rlorch.engine.forward import score
from rlorch.engine.logprobs import target_logprobs
from rlorch.engine.model import load_policy
from rlorch.engine.serving import Bits, bit_views, resolve_serve_dtype, serving_tensors
from rlorch.engine.tokenizer import load_tokenizer
from rlorch.errors import RlorchError, StorageError, UserError, WeightsError
from rlorch.losses import Loss, find_loss
from rlorch.specs import TrainerSpec, WeightsSpec
from rlorch.types import AdamParams, Datum, Floats, ForwardResult, LossSpec, Manifest, Normalization, StepResult
from rlorch.weights.codec import encode_update

FORMAT = 1
"""Layout of what `save` writes."""
STATE_FILE = "trainer.json"


@dataclass(slots=True)
class Accumulated:
    """What the gradient holds: `calls` of forward_backward, their loss tokens (sum of masks) and rows."""

    calls: int = 0
    num_loss_tokens: float = 0.0
    num_sequences: int = 0
    failure: str | None = None


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
        self._adamw = AdamW(self._parameters)
        self._version = 0
        self._accumulated = Accumulated()
        self._exported: Exported | None = None
        self._published: Exported | None = None

    @property
    def version(self) -> int:
        """Optimizer steps applied."""
        return self._version

    # --- computing ------------------------------------------------------------------------------------------

    def forward(self, datums: Sequence[Datum]) -> ForwardResult:
        """Log-probabilities of every target under the current weights. Raises `UserError`."""
        return ForwardResult(score(self._policy, self._spec, datums), {})

    def forward_backward(self, datums: Sequence[Datum], loss: LossSpec) -> ForwardResult:
        """Add the gradient of the summed loss.

        Returns:
            Log-probabilities at the positions that contribute (mask or weight not 0) and 0 elsewhere; the loss's
            metrics, and `entropy:sum` for losses that have a mask.

        Raises:
            ConfigError: an unknown loss or option.
            UserError: a datum that does not fit the model or the loss.
        """
        kind = find_loss(loss.name)
        config = kind.configure(loss.config)
        rows = lay_out(
            datums, vocab_size=self._policy.vocab_size, max_tokens=self._policy.max_tokens, loss=kind, config=config
        )
        logprobs_N = np.zeros(len(rows.tokens_N), dtype=np.float32)
        metrics: list[dict[str, torch.Tensor]] = []
        try:
            for batch in micro_batches(rows, self._spec.micro_batch_tokens, self._policy.device):
                values_N, measured = self._backward(batch, kind, config)
                logprobs_N[batch.sources_N] = values_N
                metrics.append(measured)
        except Exception as error:
            self._adamw.clear()
            self._accumulated = Accumulated(failure=f"{type(error).__name__}: {error}")
            raise
        merged = _merge(metrics) or {"loss:sum": 0.0, "num_loss_tokens:sum": 0.0}
        self._accumulated.calls += 1
        self._accumulated.num_loss_tokens += merged["num_loss_tokens:sum"]
        self._accumulated.num_sequences += len(datums)
        return ForwardResult(rows.unpack(logprobs_N), merged)

    def optim_step(self, adam: AdamParams, normalization: Normalization) -> StepResult:
        """Divide the accumulated gradient, clip it, step AdamW, clear it; version + 1.

        Raises:
            UserError: nothing was accumulated.
            RlorchError: a forward_backward since the last step failed, so the gradient is incomplete.
            NonFiniteError: the gradient is not finite.
            In all cases weights, moments and version are unchanged and the gradient is dropped.
        """
        done, self._accumulated = self._accumulated, Accumulated()
        if done.failure is not None:
            self._adamw.clear()
            raise RlorchError(
                f"a forward_backward before the step to version {self._version + 1} failed ({done.failure}), so its "
                "gradient is incomplete and was dropped; repeat the forward_backward calls, then step"
            )
        if done.calls == 0:
            raise UserError(f"optim_step at version {self._version}: no forward_backward came before it")
        divisor = {"num_loss_tokens": done.num_loss_tokens, "num_sequences": done.num_sequences, "none": 1.0}
        grad_norm = self._adamw.step(adam, float(divisor[normalization]) or 1.0)
        self._version += 1
        return StepResult(
            self._version,
            {
                "grad_norm:last": grad_norm,
                "learning_rate:last": adam.learning_rate,
                "num_loss_tokens:last": done.num_loss_tokens,
                "num_sequences:last": float(done.num_sequences),
            },
        )

    def _backward(
        self, batch: MicroBatch, loss: Loss, config: Mapping[str, float | str]
    ) -> tuple[Floats, dict[str, torch.Tensor]]:
        """Forward and backward of one micro-batch: its log-probs [N] and metrics."""
        with self._policy.computing():
            hidden_ND = self._policy.hidden(batch.tokens_BT).flatten(0, 1)[batch.positions_N]
            logprobs_N, entropy_N = target_logprobs(
                self._policy.head,
                hidden_ND,
                batch.targets_N,
                self._spec.logprob_chunk_tokens,
                with_entropy=loss.selector == "mask",
            )
        result = loss.function(logprobs_N, batch.inputs, batch.lengths_B, config)
        result.loss.backward()
        metrics = dict(result.metrics)
        if entropy_N is not None:
            mask_N = batch.inputs.get("mask")
            metrics["entropy:sum"] = (entropy_N if mask_N is None else mask_N * entropy_N).sum()
        return logprobs_N.detach().cpu().numpy(), metrics

    # --- publishing -----------------------------------------------------------------------------------------

    def export(self, kind: str) -> tuple[Manifest, bytes]:
        """The current version as an "anchor", or as a "delta" against the last published bits (an anchor when there
        are none, or when they are of this very version). Idempotent."""
        if kind not in ("anchor", "delta"):
            raise UserError(f"export of kind {kind!r}; it must be anchor or delta")
        bits, dtypes = bit_views(serving_tensors(self._policy.model, self._serve_dtype))
        base = self._published
        delta = kind == "delta" and base is not None and base.version < self._version
        manifest, payload = encode_update(
            version=self._version,
            kind="delta" if delta else "anchor",
            base_version=base.version if delta and base else None,
            base=base.bits if delta and base else None,
            new=bits,
            dtypes=dtypes,
            zstd_level=self._zstd_level,
        )
        self._exported = Exported(self._version, bits)
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
        files.write_tensors(directory, "optimizer", self._adamw.tensors())
        files.write_tensors(directory, "generator", files.rng_tensors())
        digests = files.seal(directory)
        files.write_record(directory / STATE_FILE, {"format": FORMAT, "version": self._version, "files": digests})
        return files.seal(directory)

    def load(self, path: str) -> int:
        """Read what `save` wrote; returns the version. Idempotent.

        All files are verified before anything changes. Drops accumulated gradients and the published base, so that
        the next export is an anchor.

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
        self._adamw.clear()
        self._adamw.restore(files.read_tensors(directory, "optimizer"))
        files.restore_rng(dict(files.read_tensors(directory, "generator")))
        self._accumulated = Accumulated()
        self._exported = self._published = None
        self._version = int(state["version"])
        return self._version

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


def _merge(metrics: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, Any]:
    """Metrics of micro-batches as one, by their reductions; one device synchronisation."""
    if not metrics:
        return {}
    names = list(metrics[0])
    values_BK = torch.stack([torch.stack([part[name] for name in names]).double() for part in metrics])
    total, largest = values_BK.sum(0).tolist(), values_BK.amax(0).tolist()
    return {name: largest[i] if name.endswith(":max") else total[i] for i, name in enumerate(names)}
