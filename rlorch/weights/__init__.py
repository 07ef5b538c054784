"""Versions of the weights: codec, chain, store, publisher, gate, syncer."""
