"""Policy-gradient and supervised losses with their corrections: pure functions over torch tensors."""
