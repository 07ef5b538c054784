"""How one prompt becomes one token-exact trajectory: single turn, multi-turn, environments."""
