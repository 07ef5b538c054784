"""Ray shells: each actor method is one hop to an engine. Nothing here decides."""
