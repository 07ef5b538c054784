"""Dataset rows from files, the Hugging Face hub and reasoning_gym; preference pairs; rows held out by content."""

from rlorch.data.load import load_rows
from rlorch.data.pairs import preference_pair
from rlorch.data.rows import DataSpec, Row, Rows
from rlorch.data.split import split_held_out

__all__ = ["DataSpec", "Row", "Rows", "load_rows", "preference_pair", "split_held_out"]
