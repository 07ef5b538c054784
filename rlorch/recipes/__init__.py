"""Whole runs, each a config and one async function: sft, rl, evaluation, quickstart."""
