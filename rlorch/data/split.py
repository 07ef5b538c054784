"""Held-out rows by content: a prompt is held out because of its hash, so no row of training ever shares it.

Splitting by position, or by the seed of a generator, leaks: data sets repeat prompts, and neighbouring seeds of a
generator repeat items. Here all rows of one prompt fall on one side, whatever their order.
"""

import json
from collections.abc import Mapping
from typing import Any

import xxhash

from rlorch.data.rows import Rows
from rlorch.errors import DataError


def split_held_out(rows: Rows, num_held_out: int, key: str = "prompt") -> tuple[Rows, Rows]:
    """(train, held out): the `num_held_out` distinct prompts with the smallest hashes, one row each, are held out.

    Order is kept on both sides. Repeated prompts stay repeated in train; the repeats of held-out prompts are removed.

    Args:
        rows: dataset rows.
        num_held_out: distinct prompts to hold out; 0 holds out none.
        key: the field that identifies a prompt (text, or messages).

    Raises:
        DataError: a row lacks the field, or nothing would be left to train on.
    """
    if num_held_out < 0:
        raise ValueError(f"num_held_out must be 0 or more, not {num_held_out}")
    if num_held_out == 0:
        return rows, ()
    texts = [prompt_text(row, key, index) for index, row in enumerate(rows)]
    distinct = dict.fromkeys(texts)
    if num_held_out >= len(distinct):
        raise DataError(
            f"held_out.num_prompts is {num_held_out}, but the {len(rows)} rows have only {len(distinct)} distinct "
            f"prompts; hold out fewer, or bring more data"
        )
    held_out = set(sorted(distinct, key=lambda text: (_hash(text), text))[:num_held_out])
    first_rows: dict[str, int] = {}
    for index, text in enumerate(texts):
        if text in held_out:
            first_rows.setdefault(text, index)
    return (
        [row for row, text in zip(rows, texts, strict=True) if text not in held_out],
        [rows[index] for index in first_rows.values()],
    )


def prompt_text(row: Mapping[str, Any], key: str, index: int) -> str:
    """What identifies a row's prompt: its text, or its messages as canonical JSON.

    Raises:
        DataError: no such field.
    """
    if key not in row:
        raise DataError(
            f"row {index}: no field {key!r} to hold rows out by; it has {', '.join(map(repr, row)) or 'none'}. "
            f"Set render.prompt_field to the field that identifies a prompt"
        )
    value = row[key]
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _hash(text: str) -> bytes:
    return xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass"))
