"""Logging of a run: one file per role, one line per record, no secrets.

Owns `logs/<role>.log`. A line is logfmt, so that both `grep` and a parser can read it:

    time=2026-01-31T12:00:00.123Z level=warning role=trainer msg="loss is not finite" step=12 logger=rlorch.engine

Code logs with the standard library: `log.warning("loss is not finite", extra={"step": 12})`; whatever `extra` holds
becomes a field. `extra={"role": ...}` sends a record to another role's file, for processes with several roles. The
terminal gets warnings and worse only; progress there is the console's.

Secrets: values of environment variables and config keys whose names look secret never reach a file or the terminal,
nor do bearer tokens, passwords in URLs and `key=value` pairs with a secret name.
"""

import json
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

REDACTED = "[redacted]"
MIN_SECRET_CHARS = 6  # shorter values would redact ordinary words

_ALWAYS = {"secret", "secrets", "password", "passwd", "passphrase", "credential", "credentials", "authorization"}
_AT_THE_END = {"key", "token", "apikey"}  # max_tokens and tokenizer are no secrets, HF_TOKEN is
_VOCABULARY = {"eos", "bos", "pad", "unk", "sep", "cls", "mask"}  # eos_token is a word of the model
_WORDS = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z0-9]+|[A-Z0-9]+")
_PAIR = re.compile(
    r"(?i)\b([\w-]*(?:api[_-]?key|[_-]key|[_-]token|token|secret|password|passwd))(['\"]?\s*[=:]\s*)(['\"]?)[^\s'\",;&]+"
)
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{6,}")
_URL = re.compile(r"(\w+://[^\s/:@]+):[^\s/@]+@")
_PLAIN = re.compile(r"[\w.:/\[\]-]+")
_STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "role"}


def is_secret(name: str) -> bool:
    """Whether a config key or environment variable holds a secret, judged by its name."""
    words = [word.lower() for word in _WORDS.findall(name)]
    if not words or not _ALWAYS.isdisjoint(words):
        return bool(words)
    if words[-1] in ("keys", "tokens"):
        return len(words) > 1 and words[-2] in ("api", "access", "auth", "private")
    return words[-1] in _AT_THE_END and not (len(words) > 1 and words[-2] in _VOCABULARY)


def redact(value: Any) -> Any:
    """A copy of a config with the values of secret keys replaced, at any depth. Null and booleans stay."""
    if isinstance(value, Mapping):
        return {
            key: REDACTED if is_secret(str(key)) and not isinstance(item, bool | None) else redact(item)
            for key, item in value.items()
        }
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [redact(item) for item in value]
    return redact_text(value) if isinstance(value, str) else value


def redact_text(text: str, secrets: Sequence[str] = ()) -> str:
    """Text without the given secrets, bearer tokens, passwords in URLs, and values after a secret name."""
    for secret in secrets:
        text = text.replace(secret, REDACTED)
    text = _BEARER.sub(rf"\1 {REDACTED}", text)
    text = _URL.sub(rf"\1:{REDACTED}@", text)
    return _PAIR.sub(lambda m: m[0] if not is_secret(m[1]) else f"{m[1]}{m[2]}{m[3]}{REDACTED}", text)


def secret_values(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Values of the variables whose names look secret, longest first."""
    values = {value for name, value in environ.items() if is_secret(name) and len(value) >= MIN_SECRET_CHARS}
    return tuple(sorted(values, key=len, reverse=True))


def _added_by_libraries() -> set[str]:
    """Fields that a library's record factory puts on every record (Ray and vLLM install one): not the caller's."""
    factory = logging.getLogRecordFactory()
    if factory is logging.LogRecord:
        return set()
    return set(vars(factory("", logging.INFO, "", 0, "", (), None)))


class LineFormatter(logging.Formatter):
    """A record as one logfmt line; a traceback becomes the field `trace`, its newlines escaped."""

    def __init__(self, role: str, secrets: Sequence[str]) -> None:
        super().__init__()
        self._role = role
        self._secrets = secrets

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its newline."""
        stamp = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        given = {key: value for key, value in vars(record).items() if key not in _STANDARD | _added_by_libraries()}
        fields = {"time": stamp, "level": record.levelname.lower(), "role": getattr(record, "role", self._role)}
        fields |= {"msg": record.getMessage(), **redact(given), "logger": record.name}
        if record.exc_info:
            fields["trace"] = self.formatException(record.exc_info)
        return " ".join(f"{key}={self._field(value)}" for key, value in fields.items())

    def _field(self, value: Any) -> str:
        if isinstance(value, int | float) or value is None:
            return str(value)
        text = redact_text(str(value), self._secrets)  # before quoting, which would hide what it looks for
        return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)


class _RoleFiles(logging.Handler):
    """Appends each record to the file of its role, opened at its first record."""

    def __init__(self, folder: Path, role: str) -> None:
        super().__init__()
        self._folder = folder
        self._role = role
        self._files: dict[str, TextIO] = {}

    def emit(self, record: logging.LogRecord) -> None:
        try:
            role = re.sub(r"[^\w.-]", "_", str(getattr(record, "role", self._role)))
            file = self._files.get(role)
            if file is None:
                file = self._files[role] = open(self._folder / f"{role}.log", "a", encoding="utf-8", buffering=1)  # noqa: SIM115
            file.write(self.format(record) + "\n")
        except Exception:  # the contract of logging: a record that cannot be written is reported there
            self.handleError(record)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()
        super().close()


class _Terminal(logging.Handler):
    """Warnings for people, through whatever `sys.stderr` is now: a live display replaces it while it is up."""

    def __init__(self, secrets: Sequence[str]) -> None:
        super().__init__(logging.WARNING)
        self._secrets = secrets

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = f"{record.levelname.lower()}: {record.getMessage()}"
            sys.stderr.write(redact_text(text, self._secrets) + "\n")
        except Exception:
            self.handleError(record)


class RunLogs:
    """Logging of this process, from construction until `close`.

    Args:
        run_dir: the run directory; files go to `logs/` in it.
        role: the role of records that name none, such as "coordinator" or "sampler-0".
        level: of rlorch, actors and rewards; other libraries log warnings and worse.
        terminal: whether warnings also go to stderr (off in workers, whose files are enough).
        environ: searched for secrets; default the environment of the process.
    """

    def __init__(
        self,
        run_dir: Path,
        role: str,
        *,
        level: int = logging.INFO,
        terminal: bool = True,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        secrets = secret_values(os.environ if environ is None else environ)
        folder = run_dir / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        files = _RoleFiles(folder, role)
        files.setFormatter(LineFormatter(role, secrets))
        self._handlers: list[logging.Handler] = [files, *([_Terminal(secrets)] if terminal else [])]
        self._levels: list[tuple[logging.Logger, int]] = []
        root = logging.getLogger()
        for handler in self._handlers:
            root.addHandler(handler)
        for name in ("rlorch", "actors", "rewards"):
            logger = logging.getLogger(name)
            self._levels.append((logger, logger.level))
            logger.setLevel(level)

    def close(self) -> None:
        """Take the handlers off, close the files, and restore the levels. Idempotent."""
        while self._handlers:
            handler = self._handlers.pop()
            logging.getLogger().removeHandler(handler)
            handler.close()
        while self._levels:
            logger, level = self._levels.pop()
            logger.setLevel(level)

    def __enter__(self) -> "RunLogs":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
