"""What a recipe reads before anything is started, so that a wrong path costs no start of a cluster."""

from dataclasses import dataclass

from rlorch.data import DataSpec, Rows, load_rows, split_held_out
from rlorch.errors import DataError
from rlorch.recipes.sections import HeldOutSpec
from rlorch.render.prompt import RenderSpec


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """Rows to train on and rows held out: the same for the same data, whatever the seed of the run."""

    train_rows: Rows
    held_out_rows: Rows


def read_rows(data: DataSpec, held_out: HeldOutSpec, render: RenderSpec) -> Inputs:
    """Load and split the data; blocks for seconds where there is much of it.

    Raises:
        DataError: a row, named by its place, or nothing is left to train on.
    """
    train, kept_out = split_held_out(load_rows(data), held_out.num_prompts, render.prompt_field)
    if not train:
        raise DataError(f"{data.source}: no rows are left to train on; lower held_out.num_prompts")
    return Inputs(train, kept_out)
