"""What every actor process does first: limit its threads and send what it prints to the run's log folder."""

import os
import sys
from pathlib import Path

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def prepare(role: str, run_dir: str, threads: int) -> None:
    """Call before torch is imported: Ray's own default of one thread per requested CPU is overwritten, because two
    spinning threads beside a busy process were measured 15 times slower than one.

    File descriptors 1 and 2 go to logs/<role>.log, so that engines and C++ code that print end there too.
    """
    for variable in THREAD_VARIABLES:
        os.environ[variable] = str(threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    folder = Path(run_dir) / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(folder / f"{role}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
