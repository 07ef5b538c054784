"""Rows from the `datasets` library: by name from the Hugging Face hub, or a directory that `save_to_disk` wrote."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from rlorch.data.files import Placed
from rlorch.data.rows import jsonable
from rlorch.errors import DataError


def is_saved_dataset(directory: Path) -> bool:
    """Whether `save_to_disk` wrote a directory."""
    return any((directory / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))


def read_saved(directory: Path, split: str) -> Iterator[Placed]:
    """(place, row) of a saved dataset; of one split where it has several.

    Raises:
        DataError: unreadable, no such split, or the library is missing.
    """
    library = _datasets(str(directory))
    try:
        loaded = library.load_from_disk(str(directory))
    except Exception as error:  # the library raises what its readers raise
        raise DataError(f"{directory}: not readable as a saved dataset: {error}") from error
    yield from _rows(_choose(loaded, split, str(directory)), str(directory))


def read_hub(name: str, split: str, options: Mapping[str, Any]) -> Iterator[Placed]:
    """(place, row) of a dataset on the hub, downloaded or from the library's cache.

    Raises:
        DataError: no such dataset or split, no network, or the library is missing.
    """
    library = _datasets(name)
    try:
        loaded = library.load_dataset(name, split=split, **options)
    except Exception as error:  # network, hub, parsing and argument errors of several libraries
        raise DataError(
            f"{name}: neither a path here (looked from {Path.cwd()}) nor a dataset that can be loaded from the hub, "
            f"split {split!r}: {type(error).__name__}: {error}. Offline, download it elsewhere, `save_to_disk` it and "
            f"set data.source to that directory"
        ) from error
    yield from _rows(loaded, f"{name}[{split}]")


def _datasets(source: str) -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{source}: not a file of rows, and Hugging Face datasets need the `datasets` library: "
            f"pip install 'rlorch[data]', or give a .jsonl file"
        ) from error
    return datasets


def _choose(loaded: Any, split: str, source: str) -> Any:
    """The dataset of a split; a saved dataset without splits is the dataset."""
    if not isinstance(loaded, dict):
        return loaded
    splits = cast("dict[str, Any]", loaded)
    if split not in splits:
        raise DataError(f"{source}: no split {split!r}; there are {', '.join(splits)}: set data.split")
    return splits[split]


def _rows(dataset: Any, source: str) -> Iterator[Placed]:
    for index, row in enumerate(dataset):
        where = f"{source} row {index}"
        yield where, jsonable(row, where)
