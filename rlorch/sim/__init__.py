"""A runtime of fake engines in virtual time: the same coordinator, pool and syncer, days in seconds."""
