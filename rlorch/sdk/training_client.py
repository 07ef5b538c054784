"""A model in training, as tinker's and Fireworks' training clients have it.

    client.forward_backward_custom(batch, objective).result()
    client.optim_step(tinker.AdamParams(learning_rate=1e-5)).result()
    client.save_weights_for_sampler_ext("step-00001")

Every call returns a future at once and operations run in the order of the calls (`rlorch.sdk.operations`), so the next
step can be submitted before the last one's result is read. Gradients add up until `optim_step`. A failed operation
raises at its own `.result()`; those after it still run.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import tinker
from tinker import types as tt

from rlorch.aio import Lane
from rlorch.errors import UserError
from rlorch.sdk import tinker_types
from rlorch.sdk.connection import Connection
from rlorch.sdk.futures import ApiFuture
from rlorch.sdk.operations import Operations
from rlorch.sdk.session import Session
from rlorch.service.types import (
    Checkpoint,
    CheckpointKind,
    Forward,
    ForwardBackward,
    LoadAdapter,
    Loaded,
    LoadState,
    ModelInfo,
    OptimStep,
    SaveSampler,
    SaveState,
)
from rlorch.types import Datum, Floats, ForwardResult, LossSpec, Normalization, StepResult

CustomLossFn = Callable[[list[Any], list[Any]], tuple[Any, Mapping[str, float]]]
"""`loss_fn(data, logprobs)` -> (0-d torch tensor, metrics): `data` as it was passed, `logprobs` float32 tensors with
gradient, one per datum, of the shape of its target_tokens."""

UNLOAD_TIMEOUT_S = 600.0
SAVE_TIMEOUT_S = 2700.0
CROSS_JOB = "cross_job://"
CHECKPOINT_TYPES = ("base", "delta", "merged_base")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SaveSamplerResult:
    """A snapshot for serving: `path` for `create_sampling_client` and promotion, `snapshot_name` (with the session's
    suffix) for a hot load; its kind, and `digest`, which names the content."""

    path: str
    snapshot_name: str
    checkpoint_type: CheckpointKind
    digest: str


class TrainingClient:
    """One model of a trainer job. `ServiceClient.create_training_client` makes it.

    Args:
        connection: the service.
        info: the model as the service opened it, or found it.
        session: the session it was opened in; its suffix ends the names of snapshots, so that two clients never write
            the same one.
        model_dir: directory of the base model; its tokenizer is there.
    """

    def __init__(self, connection: Connection, info: ModelInfo, session: Session, model_dir: str) -> None:
        self._connection = connection
        self._info = info
        self._session = session
        self._model_dir = model_dir
        self._operations = Operations(connection, info.id, info.next_seq_id)
        self._lane = Lane(f"loss-{info.id}")

    @property
    def model_id(self) -> str:
        """The service's id of the model, `<job>:<name>`."""
        return self._info.id

    @property
    def job_id(self) -> str:
        """The trainer job that it lives in."""
        return self._info.job_id

    @property
    def session_id(self) -> str:
        """The session that it was opened in."""
        return self._session.id

    @property
    def lora_rank(self) -> int:
        """Rank of the adapter; 0 where all weights are trained."""
        return self._info.lora_rank

    @property
    def base_model(self) -> str:
        """The base model, as it was named."""
        return self._info.base_model

    # --- training -----------------------------------------------------------------------------------------

    def forward(
        self, data: Sequence[Any], loss_fn: str = "cross_entropy", loss_fn_config: Mapping[str, Any] | None = None
    ) -> ApiFuture[tinker.ForwardBackwardOutput]:
        """Log-probabilities of each datum's targets: `loss_fn_outputs[i]["logprobs"]`.

        `loss_fn_config={"top_k": K}` adds `top_k_indices` and `top_k_logprobs`. No gradient.
        """
        tinker_types.to_loss(loss_fn, None)
        config = dict(loss_fn_config or {})
        top_k = int(config.pop("top_k", 0))
        if config:
            raise UserError(f"forward knows the option top_k, not {', '.join(config)}")
        datums = tinker_types.to_datums(data, keys=())
        return self._operations.start(Forward(datums, top_k), _as_output, "forward")

    def forward_backward(
        self, data: Sequence[Any], loss_fn: str, loss_fn_config: Mapping[str, Any] | None = None
    ) -> ApiFuture[tinker.ForwardBackwardOutput]:
        """Add the gradient of a built-in loss (`rlorch.losses`), summed over tokens, to what has been accumulated."""
        datums = tinker_types.to_datums(data)
        loss = tinker_types.to_loss(loss_fn, loss_fn_config)
        metrics: dict[str, float] = {}
        if loss.name == "cross_entropy":
            metrics["response_tokens"] = tinker_types.count_response_tokens(datums)

        def convert(result: ForwardResult) -> tinker.ForwardBackwardOutput:
            return tinker_types.from_forward(result, metrics)

        return self._operations.start(ForwardBackward(datums, loss), convert, f"forward_backward({loss.name})")

    def forward_backward_custom(
        self,
        data: Sequence[Any],
        loss_fn: CustomLossFn,
        *,
        loss_type_input: Literal["logprobs"] = "logprobs",
        output: str = "logprobs",
        pooling: str | None = None,
        precomputed_forward: "tinker.ForwardBackwardOutput | ApiFuture[tinker.ForwardBackwardOutput] | None" = None,
    ) -> ApiFuture[tinker.ForwardBackwardOutput]:
        """Add the gradient of a loss of your own, exactly, whatever it couples.

        A forward gives the log-probabilities; `loss_fn` runs here, in this process, in a thread of its own; the
        derivative of its value by each log-probability goes back as the weights of a cross-entropy. The result's
        metrics are those of the backward pass, `loss:sum` the loss's value, and what `loss_fn` returned.

        Args:
            data: datums; `loss_fn_inputs` may hold whatever `loss_fn` reads, only `target_tokens` are sent.
            loss_fn: see `CustomLossFn`; must not call this client.
            loss_type_input, output, pooling: as hosted services have them; only "logprobs" is supported.
            precomputed_forward: the outcome of `forward` on the same data under the current weights; saves a forward.
        """
        if loss_type_input != "logprobs" or output != "logprobs" or pooling is not None:
            raise UserError(
                "forward_backward_custom takes losses of log-probabilities, not "
                f"{loss_type_input=}, {output=}, {pooling=}"
            )
        data = list(data)
        datums = tinker_types.to_datums(data, keys=())

        async def run(first: int) -> tinker.ForwardBackwardOutput:
            last = first if precomputed_forward is not None else first + 1
            try:
                if precomputed_forward is None:
                    result = await self._operations.run(first, Forward(datums))
                    logprobs = cast(ForwardResult, result).logprobs
                else:
                    given = precomputed_forward
                    given = await given.result_async() if isinstance(given, ApiFuture) else given
                    logprobs = _check_precomputed(tinker_types.forward_logprobs(given), datums)
                call = self._operations.guarded(lambda: _linearize(data, datums, logprobs, loss_fn))
                rows, metrics = await self._lane.run(call)
            except BaseException:
                await self._operations.skip(last)
                raise
            result = await self._operations.run(last, ForwardBackward(rows, LossSpec("cross_entropy")))
            return tinker_types.from_forward(cast(ForwardResult, result), metrics)

        count = 1 if precomputed_forward is not None else 2
        return self._operations.start_sequence(run, count, "forward_backward_custom")

    def optim_step(
        self,
        adam_params: Any,
        grad_accumulation_normalization: Normalization | None = None,
        emit_grad_norm_metrics: bool | None = None,
    ) -> ApiFuture[tinker.OptimStepResponse]:
        """Step AdamW with the accumulated gradient and clear it.

        Args:
            adam_params: `tinker.AdamParams`.
            grad_accumulation_normalization: divide the gradient first: "num_loss_tokens", "num_sequences", or "none".
            emit_grad_norm_metrics: taken; the metrics always have the norms.
        """
        del emit_grad_norm_metrics
        normalization = grad_accumulation_normalization or "none"
        if normalization not in ("num_loss_tokens", "num_sequences", "none"):
            raise UserError(
                f"grad_accumulation_normalization is {normalization!r}; one of num_loss_tokens, num_sequences, none"
            )
        operation = OptimStep(tinker_types.to_adam(adam_params), normalization)
        return self._operations.start(operation, _as_step, "optim_step")

    # --- snapshots for serving ----------------------------------------------------------------------------

    def save_weights_for_sampler(
        self,
        name: str,
        checkpoint_type: str | None = None,
        ttl_seconds: float | None = None,
        export_precision: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> ApiFuture[SaveSamplerResult]:
        """Save a snapshot that deployments hot-load, under `name` and the session's suffix.

        Args:
            name: of letters, digits, '-', '_' and '.'.
            checkpoint_type: "base" (whole weights), "delta" (against the snapshot before), "merged_base" (an adapter
                in its base); None: an adapter for LoRA, else base first and delta after it.
            ttl_seconds: deleted that long after, unless something needs it.
            export_precision: None or "source".
            metadata: taken; not kept.
        """
        del metadata
        operation = SaveSampler(f"{name}-{self._session.suffix}", self._kind(checkpoint_type), ttl_seconds)
        if export_precision not in (None, "source"):
            raise UserError(f"export_precision {export_precision!r}: snapshots keep the precision that is served")
        return self._operations.start(operation, _as_snapshot, f"save_weights_for_sampler({name})")

    def save_weights_for_sampler_ext(
        self,
        name: str,
        checkpoint_type: str | None = None,
        ttl_seconds: float | None = None,
        export_precision: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        timeout: float = SAVE_TIMEOUT_S,
    ) -> SaveSamplerResult:
        """`save_weights_for_sampler`, waited for: at most `timeout` seconds."""
        return self.save_weights_for_sampler(name, checkpoint_type, ttl_seconds, export_precision, metadata).result(
            timeout
        )

    def create_sampling_client(self, model_path: str, **options: Any) -> Any:
        """Hot-load a snapshot on the deployment that serves this job and sample from it; see `ServiceClient`."""
        from rlorch.sdk.sampling_client import sampling_client_for_snapshot

        return sampling_client_for_snapshot(self._connection, self.job_id, model_path, **options)

    # --- states -------------------------------------------------------------------------------------------

    def save_state(
        self, name: str, ttl_seconds: float | None = None, overwrite: bool = False, *, timeout: float | None = None
    ) -> ApiFuture[tt.SaveWeightsResponse]:
        """Save weights, optimizer and step; the result's `path` is what `load_state` takes.

        Args:
            name: unique in the job.
            ttl_seconds: deleted that long after.
            overwrite: must be False: a state is never replaced.
            timeout: taken; bound `.result()` instead.
        """
        del timeout
        if overwrite:
            raise UserError(f"save_state({name!r}, overwrite=True): a state is never replaced; choose another name")
        return self._operations.start(SaveState(name, ttl_seconds), _as_saved, f"save_state({name})")

    def load_state(self, path: str) -> ApiFuture[tt.LoadWeightsResponse]:
        """Load a state's weights, with a fresh optimizer. `path`: of `save_state`, or of `resolve_checkpoint_path`."""
        return self._operations.start(LoadState(path, optimizer=False), _as_loaded, f"load_state({path})")

    def load_state_with_optimizer(self, path: str) -> ApiFuture[tt.LoadWeightsResponse]:
        """Load a state's weights, optimizer and step."""
        return self._operations.start(LoadState(path, optimizer=True), _as_loaded, f"load_state_with_optimizer({path})")

    def load_adapter(self, path: str) -> ApiFuture[tt.LoadWeightsResponse]:
        """Load the weights of a PEFT directory, or of a saved adapter, into this LoRA model."""
        return self._operations.start(LoadAdapter(path), _as_loaded, f"load_adapter({path})")

    def list_checkpoints(self) -> list[str]:
        """Names of the job's states, oldest first."""
        found: Sequence[Checkpoint] = self._connection.call("checkpoints", "list", job_id=self.job_id)
        return [checkpoint.name for checkpoint in found if checkpoint.resumable]

    def resolve_checkpoint_path(self, name: str, source_job_id: str | None = None) -> str:
        """What `load_state` takes for the state `name` of this job, or of another one."""
        if source_job_id is None or name.startswith(CROSS_JOB):
            return name
        return f"{CROSS_JOB}{source_job_id.rpartition('/')[2]}/{name}"

    # --- the model ----------------------------------------------------------------------------------------

    def get_info(self) -> tt.GetInfoResponse:
        """What the model is."""
        info = self._info
        return tt.GetInfoResponse(
            type="get_info",
            model_data=tt.ModelData(model_name=info.base_model, tokenizer_id=self._model_dir),
            model_id=info.id,
            is_lora=info.lora_rank > 0,
            lora_rank=info.lora_rank,
            model_name=info.base_model,
        )

    def get_tokenizer(self) -> Any:
        """The base model's tokenizer (transformers)."""
        from rlorch.engine.tokenizer import load_tokenizer

        return load_tokenizer(self._model_dir)

    def unload_model(self) -> None:
        """Wait for this client's operations, then let the service forget the model and free what it holds."""
        self._operations.wait_for_all(UNLOAD_TIMEOUT_S)
        self._connection.call("models", "unload", model_id=self.model_id)

    def forward_projection(self, *_: Any, **__: Any) -> None:
        """Not supported: raises `UserError`."""
        raise UserError("forward_projection: projection heads and embeddings are not supported, only log-probabilities")

    def forward_backward_contrastive(self, *_: Any, **__: Any) -> None:
        """Not supported: raises `UserError`."""
        raise UserError("forward_backward_contrastive: embeddings are not supported; see forward_backward_custom")

    def _kind(self, checkpoint_type: str | None) -> CheckpointKind | None:
        if checkpoint_type not in (None, *CHECKPOINT_TYPES):
            raise UserError(f"checkpoint_type is {checkpoint_type!r}; one of {', '.join(CHECKPOINT_TYPES)}, or None")
        if checkpoint_type == "merged_base" and not self.lora_rank:
            raise UserError("checkpoint_type 'merged_base' folds an adapter into its base, but this model has none")
        if self.lora_rank and checkpoint_type != "merged_base":
            return "lora"  # whatever was asked for: an adapter is always saved whole
        return cast("CheckpointKind | None", checkpoint_type)


FiretitanTrainingClient = TrainingClient


def _linearize(
    data: list[Any], datums: Sequence[Datum], logprobs: Sequence[Floats], loss_fn: CustomLossFn
) -> tuple[tuple[Datum, ...], dict[str, float]]:
    """Rows whose cross-entropy has the gradient of `loss_fn` at these log-probs, and the metrics to report."""
    from rlorch.losses.custom import linearize

    linear = linearize(datums, logprobs, lambda _datums, leaves: loss_fn(data, leaves))
    return linear.datums, {"loss:sum": linear.loss, **linear.metrics}


def _check_precomputed(logprobs: tuple[Floats, ...], datums: Sequence[Datum]) -> tuple[Floats, ...]:
    shapes = [values.shape for values in logprobs]
    expected = [datum.loss_inputs[tinker_types.TARGETS].shape for datum in datums]
    if shapes != expected:
        raise UserError(f"precomputed_forward has log-probabilities of shapes {shapes}, the data of {expected}")
    return logprobs


def _as_output(result: ForwardResult) -> tinker.ForwardBackwardOutput:
    return tinker_types.from_forward(result)


def _as_step(result: StepResult) -> tinker.OptimStepResponse:
    return tinker_types.from_step(result)


def _as_snapshot(saved: Checkpoint) -> SaveSamplerResult:
    return SaveSamplerResult(saved.resource_name, saved.name, saved.kind, saved.digest)


def _as_saved(saved: Checkpoint) -> tt.SaveWeightsResponse:
    return tt.SaveWeightsResponse(path=saved.name, type="save_weights")


def _as_loaded(loaded: Loaded) -> tt.LoadWeightsResponse:
    return tt.LoadWeightsResponse(path=loaded.ref, type="load_weights")
