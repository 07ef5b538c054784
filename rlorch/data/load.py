"""A DataSpec to rows: what the source names decides who reads it.

reasoning_gym:<task>                 the generator
*.jsonl *.ndjson *.json *.csv *.parquet, also as a glob    files
a directory                          save_to_disk's, else the files in it
anything else                        a name on the Hugging Face hub
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from rlorch.data.files import Placed, files_of_directory, find_files, is_file_source, read_files
from rlorch.data.hub import is_saved_dataset, read_hub, read_saved
from rlorch.data.reasoning_gym import PREFIX, read_reasoning_gym
from rlorch.data.rows import DataSpec, Rows, check_row
from rlorch.errors import DataError


def load_rows(spec: DataSpec) -> Rows:
    """All rows of a source, checked, in its own order, the same every time. Blocks: seconds for large sources.

    Raises:
        DataError: the source or a row is unusable; the message names the place and the fix.
    """
    rows: Rows = [check_row(row, where, spec) for where, row in islice(_read(spec), spec.limit)]
    if not rows:
        raise DataError(f"{spec.source}: no rows (split {spec.split!r}); check data.source")
    return rows


def _read(spec: DataSpec) -> Iterator[Placed]:
    source = spec.source
    if source.startswith(PREFIX):
        return read_reasoning_gym(source.removeprefix(PREFIX), spec.options, spec.limit)
    directory = Path(source).expanduser()
    if directory.is_dir():
        _refuse_options(spec)
        if is_saved_dataset(directory):
            return read_saved(directory, spec.split)
        return read_files(files_of_directory(directory, spec.split))
    if is_file_source(source):
        _refuse_options(spec)
        return read_files(find_files(source))
    if source.startswith(("/", "./", "../", "~")):
        raise DataError(f"{source}: no such file or directory (looked from {Path.cwd()}); check data.source")
    return read_hub(source, spec.split, spec.options)


def _refuse_options(spec: DataSpec) -> None:
    if spec.options:
        raise DataError(
            f"{spec.source}: files take no data.options, but there are {', '.join(spec.options)}; remove them"
        )
