"""Rows from reasoning_gym: endless procedural tasks with an answer that can be checked.

Item i of seed s is item 0 of seed s + i for many tasks, so two seeds are not two disjoint sets: hold rows out by
content (`rlorch.data.split`), never by seed.
"""

import difflib
import warnings
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from rlorch.data.files import Placed
from rlorch.data.rows import jsonable
from rlorch.errors import DataError

PREFIX = "reasoning_gym:"
DEFAULT_SIZE = 10_000


def read_reasoning_gym(task: str, options: Mapping[str, Any], limit: int | None) -> Iterator[Placed]:
    """(place, row) of a task; rows have prompt (the question), question, answer, metadata, task.

    Args:
        task: a dataset name of reasoning_gym, e.g. `spell_backward`.
        options: `size` (default: `limit`, else 10,000), `seed` (default 0) and the task's own.
        limit: rows that will be used.

    Raises:
        DataError: no such task or option, or the library is missing.
    """
    library = _reasoning_gym()
    known = list(library.factory.DATASETS)
    if task not in known:
        close = difflib.get_close_matches(task, known, 3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {len(known)}, e.g. spell_backward"
        raise DataError(f"{PREFIX}{task}: reasoning_gym has no such task; {hint}")
    arguments = {"size": limit or DEFAULT_SIZE, "seed": 0} | dict(options)
    try:
        dataset = library.create_dataset(task, **arguments)
    except (TypeError, ValueError, AssertionError) as error:
        raise DataError(f"{PREFIX}{task}: data.options {arguments} are refused: {error}") from error
    for index in range(len(dataset)):
        item = dataset[index]
        where = f"{PREFIX}{task} item {index}"
        yield (
            where,
            {
                "prompt": item["question"],
                "question": item["question"],
                "answer": jsonable(item["answer"], f"{where} answer", or_text=True),
                "metadata": jsonable(item["metadata"], f"{where} metadata", or_text=True),
                "task": task,
            },
        )


def _reasoning_gym() -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a dependency of it has invalid escapes and `is` with literals
            import reasoning_gym
    except ImportError as error:
        raise DataError(f"{PREFIX}... needs reasoning_gym: pip install 'rlorch[reasoning-gym]'") from error
    return reasoning_gym
