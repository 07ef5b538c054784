"""rlorch: async-first RL post-training of language models on hardware its users own."""

__version__ = "0.1.0"
