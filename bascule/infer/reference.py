"""What the model says of a text, in fp32 on the CPU, and by how much a right engine may differ: what exports, foreign engines and
stamped answers are held against.

The allowance is measured on the text at hand (DESIGN section 2.3): the same model in float64 shows what fp32 rounding costs here, and
weights moved by one unit in the last place of a coarser type show what that type costs. Letters: T tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bascule import draws
from bascule.infer.linear import quantised
from bascule.model.transformer import Transformer
from bascule.numerics import perturb_one_ulp

MARGIN = 8.0
"""Engines sum in another order: transformers lies at 0.8 times the measured rounding, vLLM with its rotary mended near it; a wrong
rotation lies thousands of times above (docs/serve.md)."""


@dataclass(frozen=True)
class Opinion:
    """`logprobs_TV[t]` belongs to the token after token t, at temperature 1; `hidden_TD` is what the head read there."""

    logprobs_TV: Tensor
    hidden_TD: Tensor


class Reference:
    """Holds copies of `model` in fp32 and float64; the model itself is left alone."""

    def __init__(self, model: Transformer) -> None:
        self.model = copy.deepcopy(model).to("cpu", torch.float32).eval()
        self._exact = copy.deepcopy(model).to("cpu", torch.float64).eval()

    def opinion(
        self, text: Sequence[int], *, exact: bool = False, rounded_to: torch.dtype = torch.float32
    ) -> Opinion:
        """In fp32; `exact`: in float64; `rounded_to`: in fp32 with weights of a coarser type."""
        return opinion_of(self._exact if exact else self.rounded(rounded_to), text)

    def floor(self, text: Sequence[int], dtype: torch.dtype = torch.float32) -> float:
        """Largest |difference| of a log-probability that arithmetic in `dtype` causes on this text."""
        fine, coarse = self.opinion(text, exact=True), self.opinion(text, rounded_to=dtype)
        return float((fine.logprobs_TV - coarse.logprobs_TV).abs().max())

    @torch.no_grad()
    def unturned(self, text: Sequence[int]) -> Tensor:
        """Log-probabilities (T-1, V) if every token stood at position 0: what a rotation left out would say."""
        tokens_1T = torch.tensor([list(text)])
        output = self.model(tokens_1T, positions_BT=torch.zeros_like(tokens_1T))
        return torch.log_softmax(output.logits_BTV[0, :-1].double(), dim=-1)

    def rounded(self, dtype: torch.dtype) -> Transformer:
        """The fp32 model as a chip that computes in `dtype` sees it: weights rounded to it and moved by one of its units."""
        if dtype == torch.float32:
            return self.model
        model = copy.deepcopy(self.model)
        for name, weight in model.state_dict().items():
            if dtype == torch.int8:
                if weight.ndim == 2:
                    codes, scale = quantised(weight)
                    weight.copy_(codes * scale)
                continue
            key = draws.key(0, f"reference/{name}")
            weight.copy_(perturb_one_ulp(weight.to(dtype), key))
        return model


@torch.no_grad()
def opinion_of(model: Transformer, text: Sequence[int]) -> Opinion:
    """Of a model on any chip; the result is on the CPU."""
    output = model(torch.tensor([list(text)], device=model.lm_head.weight.device))
    logits_TV = output.logits_BTV[0].to("cpu").double()
    return Opinion(torch.log_softmax(logits_TV, dim=-1), output.hidden_BTD[0].to("cpu"))
