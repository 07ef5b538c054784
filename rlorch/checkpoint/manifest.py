"""What a checkpoint is and when it goes: pure decisions on manifests.

A manifest lists every file with size and digest and carries a digest of itself, so that damage to either is seen.

Retention, in this order: pinned checkpoints and the newest resumable one stay; one with a time to live goes when that
has passed and is kept until then; of the others the newest `keep_last` stay, and every one whose step is a multiple of
`keep_every`.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import xxhash

from rlorch.errors import StorageError, UserError
from rlorch.types import CheckpointManifest, FileEntry

MANIFEST_NAME = "checkpoint.json"
FORMAT = 1

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


# --- names ------------------------------------------------------------------------------------------------


def check_name(name: str) -> str:
    """The name of a checkpoint, if it may be one.

    Raises:
        UserError: it could leave the directory or collide with the store's own files.
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{name!r} cannot name a checkpoint: use 1 to 128 letters, digits, '.', '_' and '-', beginning with a "
            f"letter or digit"
        )
    return name


def is_inside(file_name: str) -> bool:
    """Whether a relative POSIX path names a file below its directory, in one spelling only."""
    parts = file_name.split("/")
    return all(part not in ("", ".", "..") and "\\" not in part and "\0" not in part for part in parts)


# --- verification -----------------------------------------------------------------------------------------


def broken_promises(promised: Mapping[str, str], found: Mapping[str, FileEntry]) -> list[str]:
    """How the files in a directory differ from the digests that their writer returned; empty when they do not.

    Files that the writer did not list are no difference: they are hashed and listed all the same.
    """
    problems: list[str] = []
    for name, digest in promised.items():
        if not is_inside(name):
            problems.append(f"{name!r} is not a file name inside the checkpoint")
        elif name not in found:
            problems.append(f"{name} was announced but not written")
        elif found[name].digest != digest:
            problems.append(f"{name} has digest {found[name].digest}, its writer says {digest}")
    if not found:
        problems.append("the writer wrote no files")
    return problems


def damage(manifest: CheckpointManifest, found: Mapping[str, FileEntry]) -> list[str]:
    """How the files on disk differ from the manifest; empty when they do not."""
    problems: list[str] = []
    for name, entry in manifest.files.items():
        if name not in found:
            problems.append(f"{name} is missing")
        elif found[name].size_bytes != entry.size_bytes:
            problems.append(f"{name} has {found[name].size_bytes} bytes instead of {entry.size_bytes}")
        elif found[name].digest != entry.digest:
            problems.append(f"{name} has digest {found[name].digest} instead of {entry.digest}")
    return problems


# --- order and retention ----------------------------------------------------------------------------------


def oldest_first(manifests: Iterable[CheckpointManifest]) -> list[CheckpointManifest]:
    """By step, then by time."""
    return sorted(manifests, key=lambda manifest: (manifest.step, manifest.created_s))


def to_delete(
    manifests: Sequence[CheckpointManifest], *, keep_last: int | None, keep_every: int | None, now_s: float
) -> dict[str, str]:
    """Names to delete, each with the reason.

    Args:
        manifests: every checkpoint there is.
        keep_last: newest ones kept; None keeps all.
        keep_every: multiples of so many steps are kept for good; None keeps none for that.
        now_s: Unix time, seconds.
    """
    ordered = oldest_first(manifests)
    newest_resumable = next((manifest.name for manifest in reversed(ordered) if manifest.resumable), None)
    without_ttl = [manifest for manifest in ordered if manifest.ttl_seconds is None]
    surplus = without_ttl[:-keep_last] if keep_last else []
    reasons: dict[str, str] = {}
    for manifest in ordered:
        if manifest.ttl_seconds is not None and manifest.created_s + manifest.ttl_seconds <= now_s:
            reasons[manifest.name] = f"its time to live of {manifest.ttl_seconds:g} s has passed"
    for manifest in surplus:
        if keep_every is None or manifest.step % keep_every:
            reasons[manifest.name] = f"{keep_last} newer ones are kept"
    kept = {manifest.name for manifest in ordered if manifest.pinned} | {newest_resumable}
    return {name: reason for name, reason in reasons.items() if name not in kept}


# --- JSON -------------------------------------------------------------------------------------------------


def to_json(manifest: CheckpointManifest) -> bytes:
    """The manifest file.

    Raises:
        UserError: `extra` is not JSON.
    """
    fields: dict[str, Any] = {
        "format": FORMAT,
        "name": manifest.name,
        "step": manifest.step,
        "created_s": manifest.created_s,
        "config_digest": manifest.config_digest,
        "ttl_seconds": manifest.ttl_seconds,
        "pinned": manifest.pinned,
        "resumable": manifest.resumable,
        "extra": dict(manifest.extra),
        "files": {name: [entry.digest, entry.size_bytes] for name, entry in sorted(manifest.files.items())},
    }
    try:
        return json.dumps(fields | {"digest": _self_digest(fields)}, indent=1).encode()
    except (TypeError, ValueError) as error:
        raise UserError(f"checkpoint {manifest.name}: extra cannot be written as JSON: {error}") from error


def from_json(data: bytes) -> CheckpointManifest:
    """The manifest of a file.

    Raises:
        StorageError: damaged, or of a newer format.
    """
    try:
        fields = json.loads(data)
        if fields["format"] > FORMAT:
            raise StorageError(f"format {fields['format']} is newer than this rlorch reads ({FORMAT}); upgrade rlorch")
        digest = fields.pop("digest")
        if digest != _self_digest(fields):
            raise StorageError(f"{MANIFEST_NAME} does not match its own digest")
        return CheckpointManifest(
            name=fields["name"],
            step=fields["step"],
            created_s=fields["created_s"],
            files={name: FileEntry(*entry) for name, entry in fields["files"].items()},
            config_digest=fields["config_digest"],
            extra=fields["extra"],
            ttl_seconds=fields["ttl_seconds"],
            pinned=fields["pinned"],
            resumable=fields["resumable"],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StorageError(f"{MANIFEST_NAME} is not a manifest: {error!r}") from error


def _self_digest(fields: Mapping[str, Any]) -> str:
    """xxh3-128 of the fields; of what JSON makes of them, so that it is the same when they are read back."""
    return xxhash.xxh3_128_hexdigest(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode())
