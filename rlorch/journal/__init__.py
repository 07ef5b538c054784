"""The durable record of a run in SQLite, and what a resumed run reads back from it."""
