"""Which pool trains and which infers, the rollout engine in its own process, and the weights' way to it."""
