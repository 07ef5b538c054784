"""Whole runs, each a config and one async function: rl, sft, dpo, orpo, distill."""
