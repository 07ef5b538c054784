"""What a finished run left behind."""

import json
from pathlib import Path


def metrics_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights_of(run: Path, version: int) -> bytes:
    (file,) = (run / "checkpoints" / f"step-{version}").glob("weights*.safetensors")
    return file.read_bytes()
