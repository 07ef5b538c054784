"""A queueing model of one vLLM engine: pure state, advanced step by step by whoever owns the clock.

One step decodes one token of every running sequence. A sequence waits until there is a free place among
`max_num_seqs` and KV room, is prefilled in the step that admits it, and leaves after its drawn length. When the KV
cache runs full the sequence admitted last is preempted: it goes to the head of the queue and computes its tokens again.

The time of a step, fitted to vLLM on two CPU cores (3.2M parameters, max_num_seqs 32, 64 tokens in, 48 out; measured
510, 1818, 3015, 3286, 3359, 3105, 2978, 2877 tok/s at windows 2, 8, 16, 24, 32, 36, 48, 64):

    step_s = base + linear * running + quadratic * running^2 + (queue + per_waiting * waiting if any waits)

The quadratic term is the roofline bend: decoding is bound by memory at first, then by compute.
"""

import heapq
from collections import deque
from dataclasses import dataclass, field


@dataclass(frozen=True)
class EngineModel:
    """Capacity and speed of one replica; times in seconds."""

    max_num_seqs: int = 32
    kv_tokens: int = 65_536
    base_s: float = 3.75e-3
    linear_s: float = 1.0e-5
    quadratic_s: float = 5.1e-6
    queue_s: float = 7.0e-4
    per_waiting_s: float = 2.8e-5
    prefill_s_per_token: float = 2.0e-6

    def step_s(self, running: int, waiting: int, prefill_tokens: int) -> float:
        """Seconds of one step."""
        decode = self.base_s + self.linear_s * running + self.quadratic_s * running * running
        queue = self.queue_s + self.per_waiting_s * waiting if waiting else 0.0
        return decode + queue + self.prefill_s_per_token * prefill_tokens


@dataclass(eq=False, slots=True)
class Generation:
    """One sequence in the making. `spans` holds (version, first token) of each weights version it saw.

    The siblings of one request share its prompt: the first of them carries `prompt_tokens`, the others none.
    """

    request_id: str
    index: int
    prompt_tokens: int
    length: int
    queued_at: float
    queue_s: float = 0.0
    done_before: int = 0
    started_step: int = -1
    admission: int = -1
    spans: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])

    def generated(self, step: int) -> int:
        """Tokens so far."""
        return self.done_before + (step - self.started_step if self.started_step >= 0 else 0)


class Engine:
    """Running and waiting sequences of one replica, and the counters that `EngineStats` reports."""

    def __init__(self, model: EngineModel, version: int) -> None:
        self.model = model
        self.version = version
        self.generated_tokens = 0
        self.preemptions = 0
        self.steps = 0
        self.left_waiting = 0  # by the last step: who came since waits for no reason but the step
        self._admissions = 0
        self._waiting: deque[Generation] = deque()
        self._running: dict[Generation, None] = {}
        self._finish: list[tuple[int, int, Generation]] = []
        self._kv_used = 0

    @property
    def running(self) -> int:
        """Sequences being decoded."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences in the queue."""
        return len(self._waiting)

    @property
    def kv_usage(self) -> float:
        """Share of the KV cache in use."""
        return self._kv_used / self.model.kv_tokens

    @property
    def busy(self) -> bool:
        """Whether there is a step to make."""
        return bool(self._running or self._waiting)

    def enqueue(self, sequence: Generation) -> None:
        """Add a sequence. Raises ValueError when it can never fit the KV cache."""
        if sequence.prompt_tokens + sequence.length > self.model.kv_tokens:
            raise ValueError(
                f"request {sequence.request_id} needs {sequence.prompt_tokens + sequence.length} KV tokens, the engine "
                f"has {self.model.kv_tokens}: lower max_tokens"
            )
        self._waiting.append(sequence)

    def begin_step(self, now: float) -> float:
        """Admit what fits and return how many seconds the step takes."""
        prefill_tokens = 0
        while self._waiting and len(self._running) < self.model.max_num_seqs:
            sequence = self._waiting[0]
            context = sequence.prompt_tokens + sequence.done_before
            if self._kv_used + context + len(self._running) + 1 > self.model.kv_tokens:
                break
            self._waiting.popleft()
            if sequence.done_before == 0:
                sequence.queue_s = now - sequence.queued_at
            self._admissions += 1
            sequence.admission = self._admissions
            sequence.started_step = self.steps
            if not sequence.spans:
                sequence.spans.append((self.version, 0))
            self._running[sequence] = None
            heapq.heappush(
                self._finish, (self.steps + sequence.length - sequence.done_before, sequence.admission, sequence)
            )
            self._kv_used += context
            prefill_tokens += context
        self.left_waiting = len(self._waiting)
        return self.model.step_s(len(self._running), self.left_waiting, prefill_tokens)

    def end_step(self) -> list[Generation]:
        """Every running sequence has one more token; the ones that are complete leave and are returned."""
        while self._running and self._kv_used + len(self._running) > self.model.kv_tokens:
            self._preempt()
        self.steps += 1
        self._kv_used += len(self._running)
        self.generated_tokens += len(self._running)
        finished: list[Generation] = []
        while self._finish and self._finish[0][0] <= self.steps:
            _, admission, sequence = heapq.heappop(self._finish)
            if sequence in self._running and sequence.admission == admission:
                self._leave(sequence)
                finished.append(sequence)
        return finished

    def drop(self, request_id: str) -> None:
        """Forget every sequence of a request."""
        self._waiting = deque(sequence for sequence in self._waiting if sequence.request_id != request_id)
        for sequence in [sequence for sequence in self._running if sequence.request_id == request_id]:
            self._leave(sequence)

    def commit(self, version: int) -> None:
        """From the next token on, sample with `version`."""
        self.version = version
        for sequence in (*self._running, *self._waiting):
            generated = sequence.generated(self.steps)
            if sequence.spans and sequence.spans[-1][1] == generated:
                sequence.spans[-1] = (version, generated)
            elif sequence.spans:
                sequence.spans.append((version, generated))

    def _leave(self, sequence: Generation) -> None:
        del self._running[sequence]
        sequence.done_before = sequence.generated(self.steps)
        sequence.started_step = -1
        self._kv_used -= sequence.prompt_tokens + sequence.done_before

    def _preempt(self) -> None:
        last = max(self._running, key=lambda sequence: sequence.admission)
        self._leave(last)
        self._waiting.appendleft(last)
        self.preemptions += 1
