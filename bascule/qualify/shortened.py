"""What of a large model the quick battery examines: every kind of layer, at its own width, but not every layer.

A chip is asked about operators and shapes, and layers of one kind have the same. The fp64 twin, the noise floors and the short training
runs cost in proportion to parameters, on this machine's CPU: SmolLM2's 135 M met the battery's three minutes at its third question. What is lost:
how errors add up over all layers, and what only shows at the last rows of a long vocabulary; the full battery (`--full`,
`qualify.quick = false`) examines the whole model. No torch.
"""

from __future__ import annotations

from bascule.config.model import ModelConfig
from bascule.model import count

QUICK_PARAMETERS = 10e6  # models up to here are examined whole
QUICK_VOCABULARY = 8192


def shortened(config: ModelConfig) -> ModelConfig:
    """`config`, or the deepest model of its widths that has at most 10 M parameters. Two layers of the usual kind and one of the
    leading dense ones remain whatever they cost: a wide model is examined with more than 10 M."""
    if count.parameters(config) <= QUICK_PARAMETERS:
        return config
    dense = config.first_k_dense_replace if config.ffn == "moe" else 0
    usual = config.num_hidden_layers - dense
    leading, usual = (min(dense, 1), usual) if usual > 0 else (0, config.num_hidden_layers)
    update = {"vocab_size": min(config.vocab_size, QUICK_VOCABULARY)}
    if leading:
        update["first_k_dense_replace"] = leading
    shorter = [
        config.model_copy(update={**update, "num_hidden_layers": leading + layers})
        for layers in range(min(usual, 2), usual + 1)
    ]
    small = [one for one in shorter if count.parameters(one) <= QUICK_PARAMETERS]
    return small[-1] if small else shorter[0]


def what_is_examined(config: ModelConfig) -> str | None:
    """`2 of 30 layers, 8,192 of 49,152 tokens`; None where it is the whole model."""
    part = shortened(config)
    if part == config:
        return None
    words = []
    if part.num_hidden_layers < config.num_hidden_layers:
        words.append(f"{part.num_hidden_layers} of {config.num_hidden_layers} layers")
    if part.vocab_size < config.vocab_size:
        words.append(f"{part.vocab_size:,} of {config.vocab_size:,} tokens")
    return ", ".join(words)
