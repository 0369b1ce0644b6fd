"""From a prompt's tokens to a completion's tokens: sampling, the batched engine, evaluation. Token ids only, never text."""
