"""The async heart of a run: ledger, batching, prompt source, coordinator, evaluation."""
