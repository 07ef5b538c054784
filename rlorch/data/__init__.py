"""Dataset rows from files, the Hugging Face hub and reasoning_gym, and rows held out by content."""

from rlorch.data.load import load_rows
from rlorch.data.rows import DataSpec, Row, Rows
from rlorch.data.split import split_held_out

__all__ = ["DataSpec", "Row", "Rows", "load_rows", "split_held_out"]
