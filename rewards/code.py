"""The completion's Python code passes the row's tests.

The code runs in a process of its own under limits of time, CPU, memory and file size. That bounds accidents. It is NOT
a sandbox: the code has the files and the network of the user who runs rlorch. For models that are not trusted run the
reward workers in a container or a virtual machine.
"""

import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rlorch.scoring import Rollout, reward

from ._row import field

_FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)

# The token proves that the last line of the program was reached: leaving early with status 0 proves nothing. What comes
# before it proves that the program was started: where that is missing the machine is at fault, not the code.
_STARTED = b"started "
_HARNESS = """
import os, resource, sys
token, proof = sys.stdin.read(), os.dup(1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
for limit, value in ((resource.RLIMIT_CPU, {cpu_s}), (resource.RLIMIT_AS, {memory}), (resource.RLIMIT_FSIZE, 1 << 24)):
    hard = resource.getrlimit(limit)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (value, value))
with open("program.py", encoding="utf-8") as program:
    source = program.read()
os.remove("program.py")
os.write(proof, {started!r})
exec(compile(source, "program.py", "exec"), {{"__name__": "__main__"}})
os.write(proof, token.encode())
"""


@reward(name="code")
class Code:
    """The share of the row's tests that pass, 0 to 1; code that is too slow or too large does not pass.

    The code is the last fenced block of the completion, or all of it. A test is Python source (usually `assert`
    lines) that runs after the code in the same process, a fresh one per test.

    Options:
        tests: the row's field with the tests: one string, or a list of strings.
        all_or_nothing: 1 where every test passes, else 0.
        timeout_s: seconds per test. All tests together have to fit the worker's budget.
        memory_mb: address space per test.
    """

    def __init__(
        self, *, tests: str = "tests", all_or_nothing: bool = True, timeout_s: float = 5.0, memory_mb: int = 512
    ) -> None:
        if timeout_s <= 0 or memory_mb < 64:
            raise ValueError(f"timeout_s={timeout_s} has to be more than 0, memory_mb={memory_mb} at least 64")
        self._tests = tests
        self._all_or_nothing = all_or_nothing
        self._timeout_s = timeout_s
        self._harness = _HARNESS.format(cpu_s=int(timeout_s) + 1, memory=memory_mb << 20, started=_STARTED)

    def __call__(self, rollout: Rollout) -> float:
        """Score one rollout."""
        value = field(rollout, self._tests)
        tests: Sequence[str] = [value] if isinstance(value, str) else value
        if not tests:
            raise ValueError(f"the row of prompt {rollout.prompt.ordinal} has no tests in {self._tests!r}")
        blocks = _FENCED.findall(rollout.completion)
        code = blocks[-1] if blocks else rollout.completion
        passed = 0
        for test in tests:
            ok = self._passes(f"{code}\n\n{test}\n")
            if self._all_or_nothing and not ok:
                return 0.0
            passed += ok
        return passed / len(tests)

    def _passes(self, program: str) -> bool:
        token = secrets.token_hex(16).encode()
        with tempfile.TemporaryDirectory(prefix="rlorch-code-") as folder:
            Path(folder, "program.py").write_text(program, encoding="utf-8", errors="replace")
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", self._harness],
                cwd=folder,
                env={"PATH": os.environ.get("PATH", ""), "HOME": folder, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                output, _ = process.communicate(token, timeout=self._timeout_s)
            except subprocess.TimeoutExpired as error:
                output = error.output or b""
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                for pipe in (process.stdin, process.stdout):
                    if pipe is not None:
                        pipe.close()
        if not output.startswith(_STARTED):
            raise RuntimeError(
                f"the test process did not start within timeout_s={self._timeout_s:g} and memory_mb: its status is "
                f"{process.returncode}"
            )
        return output == _STARTED + token
