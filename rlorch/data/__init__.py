"""Dataset rows from JSONL, datasets and reasoning_gym."""
