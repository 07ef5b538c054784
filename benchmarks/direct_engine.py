"""vLLM called directly, in a process of its own: one measurement per line of standard input, one JSON line each.

The loop keeps `concurrency` sequences in flight and does nothing else: no futures, no versions, no other process.
`plain` builds the engine as vLLM comes (packed weights where it packs them, asynchronous scheduling); otherwise with
the settings of rlorch's sampler, which can change weights in place between two steps.
"""

import json
import os
import sys
import time
from itertools import cycle
from typing import Any


def build(work: dict[str, Any]) -> Any:
    """The engine, with the model's weights loaded."""
    from rlorch.engine.vllm_engine import CPU_ENVIRONMENT, ENVIRONMENT

    on_cpu = not _has_gpu()
    for name, value in {**ENVIRONMENT, **(CPU_ENVIRONMENT if on_cpu else {})}.items():
        os.environ.setdefault(name, value)
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    arguments: dict[str, Any] = {
        "model": work["model"],
        "dtype": "bfloat16",
        "max_model_len": work["max_model_len"],
        "max_num_seqs": work["max_num_seqs"],
        "enforce_eager": on_cpu,
        "generation_config": "vllm",
    }
    if not work["plain"]:
        from rlorch.engine.vllm_worker import keep_weights_unpacked

        if on_cpu:
            keep_weights_unpacked()
        arguments |= {"logprobs_mode": "processed_logprobs", "async_scheduling": False, "enable_prefix_caching": True}
    if on_cpu:
        arguments["kv_cache_memory_bytes"] = int(work["kv_cache_gib"] * 2**30)
    else:
        arguments["gpu_memory_utilization"] = work["gpu_memory_fraction"]
    return LLMEngine.from_engine_args(EngineArgs(**arguments))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def measure(engine: Any, work: dict[str, Any], concurrency: int, numbers: Any) -> dict[str, float]:
    """Tokens per second of answered requests over `seconds`, after `warm_up_s`."""
    from vllm import SamplingParams
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        n=work["group_size"],
        max_tokens=work["max_tokens"],
        temperature=1.0,
        stop_token_ids=[work["eos"]],
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    prompts, in_flight, answers = cycle(work["prompts"]), 0, list[tuple[float, int]]()
    start = time.perf_counter()
    end = start + work["warm_up_s"] + work["seconds"]
    while in_flight or time.perf_counter() < end:
        while in_flight < concurrency // work["group_size"] and time.perf_counter() < end:
            engine.add_request(str(next(numbers)), tokens_input(next(prompts)), params)
            in_flight += 1
        for output in engine.step():
            if output.finished:
                in_flight -= 1
                answers.append((time.perf_counter(), sum(len(sample.token_ids) for sample in output.outputs)))
    begin = start + work["warm_up_s"]
    tokens = sum(count for at_s, count in answers if begin <= at_s < end)
    return {"tokens_per_s": tokens / (end - begin)}


def main() -> None:
    """Serve measurements until standard input ends."""
    from itertools import count

    answer = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the engine prints is not an answer
    work = json.loads(sys.stdin.readline())
    engine, numbers = build(work), count()
    print(json.dumps({"ready": True}), file=answer)
    for line in sys.stdin:
        print(json.dumps(measure(engine, work, int(line), numbers)), file=answer)


if __name__ == "__main__":
    main()
