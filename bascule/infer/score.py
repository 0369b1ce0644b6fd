"""What a model thinks of a text that is already there. T tokens, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bascule.errors import NonFiniteLogits
from bascule.model.transformer import Transformer


def score(
    model: Transformer, text: Sequence[int], top: int, temperature: float = 1.0
) -> list[list[tuple[int, float]]]:
    """What the model thinks of each token of a text but the first: the token itself, then the `top` likeliest.

    Log-probabilities are those of softmax(logits / temperature).
    """
    tokens_1T = torch.tensor([list(text)], device=model.lm_head.weight.device)
    logits_TV = model(tokens_1T).logits_BTV[0, :-1].to("cpu")
    if not bool(torch.isfinite(logits_TV.sum())):
        raise NonFiniteLogits(
            "The chip returned NaN or infinity among the logits of a prompt; logits must be finite. Qualify the chip again before using it."
        )
    logprobs_TV = torch.log_softmax(logits_TV / temperature, dim=-1)
    own = logprobs_TV.gather(1, tokens_1T[0, 1:, None].to("cpu"))[:, 0].tolist()
    best = logprobs_TV.topk(top, dim=-1)
    ranked = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        [(token, logprob), *zip(tokens, values, strict=True)]
        for token, logprob, (tokens, values) in zip(text[1:], own, ranked, strict=True)
    ]


@torch.inference_mode()
def divergence(exact: Transformer, coarse: Transformer, text: Sequence[int]) -> float:
    """Mean Kullback-Leibler divergence of the next token, in nats: what it costs to answer with `coarse` instead of `exact`."""
    tokens_1T = torch.tensor([list(text)], device=exact.lm_head.weight.device)
    p_TV, q_TV = (
        torch.log_softmax(model(tokens_1T).logits_BTV[0].double(), -1) for model in (exact, coarse)
    )
    return float((p_TV.exp() * (p_TV - q_TV)).sum(-1).mean())
