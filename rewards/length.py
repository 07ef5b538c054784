"""A soft punishment of overlong completions, to be added to another reward."""

from rlorch.scoring import Rollout, reward


@reward(name="length")
class Length:
    """From 0 (short enough) down to -1 (too long): soft overlong punishment, arXiv 2503.14476, equation 13.

    With y the tokens that the policy sampled, L = max_tokens and C = cache_tokens:
    0 for y <= L - C; ((L - C) - y) / C for L - C < y <= L; -1 for y > L.

    Options:
        max_tokens: L, tokens.
        cache_tokens: C, the last tokens over which the punishment grows; 1 to L.
    """

    def __init__(self, *, max_tokens: int, cache_tokens: int) -> None:
        if not 1 <= cache_tokens <= max_tokens:
            raise ValueError(f"cache_tokens={cache_tokens} has to be between 1 and max_tokens={max_tokens}")
        self._max_tokens = max_tokens
        self._cache_tokens = cache_tokens

    def __call__(self, rollout: Rollout) -> float:
        """Score one rollout."""
        over = rollout.num_sampled_tokens - (self._max_tokens - self._cache_tokens)
        return -min(max(over, 0) / self._cache_tokens, 1.0)
