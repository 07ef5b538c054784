"""Size and speed of the weight codec against simpler codings, on synthetic BF16 weights, in one run and one thread.

Weights are normal with sigma 0.02; one Adam-like step of a given learning rate moves the float32 master weights and
rounds them to BF16 again, so the share of changed values follows from the learning rate. Ratios are relative to the
dense BF16 bytes; GB/s are of model weights per second of CPU time (so other work on the machine counts little), best
of three. Every decoded state is compared bit for bit.

    python -m benchmarks.delta_codec [--params 16] [--rates 3e-7 1e-6 3e-6 1e-5 1e-4]
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import zstandard

from rlorch.weights.codec import apply_update, decode_update, encode_update

TENSOR_ELEMENTS = 2_000_000
RATES = [3e-7, 1e-6, 3e-6, 1e-5, 1e-4]


def to_bf16_bits(values_P: Any) -> Any:
    """Round float32 to BF16, nearest even, as uint16."""
    bits_P = values_P.view(np.uint32)
    return ((bits_P + 0x7FFF + ((bits_P >> 16) & 1)) >> 16).astype(np.uint16)


def best_of_three(call: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of the fastest call, and its result."""
    seconds, result = float("inf"), None
    for _ in range(3):
        start = time.thread_time()
        result = call()
        seconds = min(seconds, time.thread_time() - start)
    return seconds, result


def measure(kind: Any, old: dict[str, Any], new: dict[str, Any]) -> tuple[int, str]:
    """Payload bytes and a row of speeds for one update."""
    size = sum(bits.nbytes for bits in new.values())
    dtypes = dict.fromkeys(new, "BF16")

    def encode() -> Any:
        return encode_update(version=1, kind=kind, base_version=0, base=old, new=new, dtypes=dtypes)

    encode_s, (manifest, payload) = best_of_three(encode)
    decode_s, updates = best_of_three(lambda: decode_update(manifest, payload))
    apply_s, state = best_of_three(lambda: apply_update(old, updates))
    assert all((state[name] == bits).all() for name, bits in new.items()), "decode(encode(x)) != x"
    speeds = "".join(f"{size / seconds / 1e9:9.2f}" for seconds in (encode_s, decode_s, apply_s))
    return len(payload), speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=int, default=16, help="millions of parameters")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    sizes = {f"layer{i}": TENSOR_ELEMENTS for i in range(max(1, options.params * 1_000_000 // TENSOR_ELEMENTS))}
    master = {name: rng.standard_normal(size, dtype=np.float32) * np.float32(0.02) for name, size in sizes.items()}
    old = {name: to_bf16_bits(values_P) for name, values_P in master.items()}
    dense_bytes = sum(bits.nbytes for bits in old.values())
    compressor = zstandard.ZstdCompressor(level=1)
    print(f"{dense_bytes / 1e6:.0f} MB of BF16 in {len(old)} tensors; ratios to dense; GB/s of weights, one thread")
    print("learning rate  changed  i32+bf16  xor+zstd1     ours | bits/changed   encode   decode    apply")
    for rate in options.rates:
        new: dict[str, Any] = {}
        for name, values_P in master.items():
            step_P = np.clip(rng.standard_normal(values_P.size, dtype=np.float32), -3, 3) * np.float32(rate)
            new[name] = to_bf16_bits(values_P - step_P)
        changed = sum(int(np.count_nonzero(old[name] != new[name])) for name in old)
        xor_bytes = sum(len(compressor.compress((old[name] ^ new[name]).tobytes())) for name in old)
        ours, speeds = measure("delta", old, new)
        print(
            f"{rate:13.0e} {2 * changed / dense_bytes:8.2%} {dense_bytes / (6 * changed):9.1f} "
            f"{dense_bytes / xor_bytes:10.1f} {dense_bytes / ours:8.1f} | {8 * ours / changed:12.1f}{speeds}"
        )
    anchor, speeds = measure("anchor", old, old)
    row = f"{dense_bytes / anchor:8.2f} | {16 * anchor / dense_bytes:12.1f}"
    print(f"{'anchor':>13} {1:8.2%} {'':9} {'':10} {row}{speeds}")


if __name__ == "__main__":
    main()
