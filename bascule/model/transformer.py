"""The decoder: one stack of blocks, two attentions, two feed-forwards. Tensors in, tensors out; it never asks which chip.

The module tree carries Hugging Face's names (`model.layers.0.self_attn...`), so that loading and saving are renames; only the
experts differ (stacked here, one by one on disk). A forward call changes no parameter and no buffer; it writes to the cache
it is given. B rows, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bascule.config.model import ModelConfig
from bascule.model.attention import cached_bias, padding_bias
from bascule.model.block import Block, PredictionLayer
from bascule.model.cache import Cache, Context, KVCache, LatentCache
from bascule.model.head import Head
from bascule.model.layers import RMSNorm, Rotary
from bascule.model.moe import MoE
from bascule.model.precision import product_dtype
from bascule.model.seats import Seats, take


@dataclass(frozen=True)
class Output:
    """`logits_BTV` fp32; where they were left out (`head_later`) `head` can be asked for targets instead (head.py). `expert_loads` [MoE layers, experts] int64, tokens that chose each expert; None without experts.

    `hidden_BTD` is what the head reads (after the last norm). `ahead_BTV` [B, T-1, V], and `ahead_BTD` that the head reads for it, only when asked for: entry t predicts
    token t+2, and the prediction layer's loads are then the last row of `expert_loads`. `routes_agree` [MoE layers, B*T] only where
    routes were replayed (routing.py).
    """

    kept_BTV: Tensor | None
    expert_loads: Tensor | None
    hidden_BTD: Tensor
    ahead_BTV: Tensor | None = None
    routes_agree: Tensor | None = None
    ahead_BTD: Tensor | None = None
    head: Head | None = None

    @property
    def logits_BTV(self) -> Tensor:
        if self.kept_BTV is None:
            raise RuntimeError("The logits were left out of this forward pass (head_later).")
        return self.kept_BTV


class Decoder(nn.Module):
    """Embedding, blocks, last norm, rotary tables."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, layer, experts=has_experts(config, layer))
            for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        mla = config.attention == "mla"
        self.rotary = Rotary(
            config.qk_rope_head_dim if mla else config.head_dim, config.max_position_embeddings, config.rope_theta,
            "neighbours" if mla else "halves", config.rope_scaling,
        )  # fmt: skip


class Transformer(nn.Module):
    """A causal language model. Parameters are uninitialised until `weights.initialise` or `weights.load_hf` fills them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Head(config.hidden_size, config.vocab_size)
        self.mtp = nn.ModuleList(
            PredictionLayer(config) for _ in range(config.num_nextn_predict_layers)
        )
        self.retie()

    def retie(self) -> None:
        """Make head and embedding one parameter again where the config says so; moving to some devices parts them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Transformer:
        """`.to` on a private-use device (npu) silently unties weights (feasibility.md 2); tie them again after every move."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.retie()
        return self

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        at_B: Tensor | None = None,
        every: bool = False,
        ahead: bool = False,
        documents: Tensor | None = None,
        right_padded: bool = False,
        seats: Seats | None = None,
        picks_M: Tensor | None = None,
        head_later: bool = False,
    ) -> Output:
        """Logits of the next token after every token.

        `mask` [B, T] is true for real tokens (attention.py); not needed for right-padded training batches. With `cache`, T tokens
        are appended to every row, or as many as `mask` says are real: real ones first. `positions_BT` overrides the rotary
        positions. `at_B` asks for the logits after one token of each row only (index into T): logits are then [B, 1, V], and the
        hidden states are those of that token too unless `every` asks for all (for `look_ahead`).
        `ahead` also runs the prediction layer over the whole call (for training; not together with `cache` or `at_B`).
        `documents` [B, T] numbers the documents packed into a row: no token sees another document's (with `mask`, without `cache`).
        `right_padded`: what `mask` hides lies behind every real token, where no causal row sees it; it is then only left out of the
        expert loads, and attention works without a mask.
        `seats`: the tokens are one flat row [1, N] that sits in right-padded rows to attend (seats.py; neither `cache` nor `documents`);
        `mask` then says how many samples each token stands for. `picks_M` asks for the logits after these tokens of it only, [1, M, V].
        `head_later`: no logits, the output's `head` works out what is asked of them.
        Raises ValueError when a position exceeds `max_position_embeddings`.
        """
        seen = None if right_padded or seats is not None else mask
        width = tokens_BT.shape[1] if seats is None else seats.token_ST.shape[1]
        context = self._context(width, positions_BT, seen, cache, documents)
        if seats is not None:
            context = replace(context, seats=seats)
        x_BTD, loads = self.model.embed_tokens(tokens_BT), []
        for block in self.model.layers:
            x_BTD, loads_E = block(x_BTD, context, mask)
            if loads_E is not None:
                loads.append(loads_E)
        if cache is not None:
            cache.close(tokens_BT.shape[1] if mask is None else mask.sum(1))
        whole_BTD = x_BTD
        if at_B is not None:
            x_BTD = x_BTD[torch.arange(x_BTD.shape[0], device=x_BTD.device), at_B].unsqueeze(1)
        if picks_M is not None:
            x_BTD = take(x_BTD.flatten(0, 1), picks_M).unsqueeze(0)
        hidden_BTD, ahead_BTD = self.model.norm(x_BTD), None
        if ahead:
            ahead_BTD, loads_E = self.look_ahead(
                hidden_BTD[:, :-1], tokens_BT[:, 1:], mask=None if mask is None else mask[:, 1:],
                documents=None if documents is None else documents[:, 1:], right_padded=right_padded,
            )  # fmt: skip
            loads += [] if loads_E is None else [loads_E]
        loads_LE = torch.stack(loads) if loads else None
        if head_later:
            return Output(None, loads_LE, hidden_BTD, ahead_BTD=ahead_BTD, head=self.lm_head)
        ahead_BTV = None if ahead_BTD is None else self._logits(ahead_BTD)
        logits_BTV = self._logits(hidden_BTD)
        if every:
            hidden_BTD = self.model.norm(whole_BTD)
        return Output(logits_BTV, loads_LE, hidden_BTD, ahead_BTV, ahead_BTD=ahead_BTD)

    def draft(
        self,
        hidden_BTD: Tensor,
        next_BT: Tensor,
        *,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        documents: Tensor | None = None,
        right_padded: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(logits fp32, hidden, expert loads) of the prediction layer for pairs of a hidden state and the token after it.

        `cache` holds the pairs before. Raises ValueError when the model has no such layer.
        """
        ahead_BTD, loads_E = self.look_ahead(
            hidden_BTD, next_BT, mask=mask, cache=cache, documents=documents, right_padded=right_padded
        )  # fmt: skip
        return self._logits(ahead_BTD), ahead_BTD, loads_E

    def look_ahead(
        self,
        hidden_BTD: Tensor,
        next_BT: Tensor,
        *,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        documents: Tensor | None = None,
        right_padded: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """`draft` without its logits: what the head would read, and the loads. Reading a prompt wants no guesses, only the cache."""
        if not self.mtp:
            raise ValueError(
                "Asked to look a token ahead; the model has num_nextn_predict_layers=0. Set it to 1 in the recipe and train it."
            )
        seen = None if right_padded else mask
        context = self._context(next_BT.shape[1], None, seen, cache, documents)
        ahead_BTD, loads_E = self.mtp[0](
            hidden_BTD, self.model.embed_tokens(next_BT), context, mask
        )
        if cache is not None:
            cache.close(next_BT.shape[1] if mask is None else mask.sum(1))
        return ahead_BTD, loads_E

    def _logits(self, hidden_BTD: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(hidden_BTD)
        return logits.float()

    def _context(
        self,
        tokens: int,
        positions_BT: Tensor | None,
        mask: Tensor | None,
        cache: Cache | None,
        documents: Tensor | None = None,
    ) -> Context:
        rotary, dtype = self.model.rotary, product_dtype(self.lm_head.weight)
        reach = tokens + (0 if cache is None else cache.longest)
        if reach > self.config.max_position_embeddings:
            raise ValueError(
                f"Asked for {reach} positions; the model has max_position_embeddings={self.config.max_position_embeddings}. "
                "Shorten the sequence or raise it in the recipe."
            )
        if cache is None:
            cos, sin = rotary.prefix(tokens) if positions_BT is None else rotary(positions_BT)
            bias = None if mask is None else padding_bias(mask, dtype, documents)
            return Context(cos, sin, bias)
        read = cache.longest > 0
        slots_BT = cache.open(tokens, ragged=mask is not None)
        cos, sin = rotary(slots_BT if positions_BT is None else positions_BT)
        masked = read and (cache.ragged or tokens > 1)
        return Context(
            cos, sin, cached_bias(slots_BT, cache.longest, dtype) if masked else None, cache, read
        )

    def new_cache(self, batch: int, length: int, device: torch.device | str | None = None) -> Cache:
        """An empty cache for `batch` rows of at most `length` tokens, on the model's device unless another is named."""
        weight = self.lm_head.weight
        kind = LatentCache if self.config.attention == "mla" else KVCache
        layers, place = self.config.num_hidden_layers, torch.device(device or weight.device)
        return kind.empty(self.config, layers, batch, length, place, weight.dtype)

    def moe_layers(self) -> list[MoE]:
        """The expert layers in the order of `expert_loads`: the trunk's, then the prediction layer's."""
        blocks = [*self.model.layers, *(layer.block for layer in self.mtp)]
        return [
            block.mlp for block in blocks if isinstance(block, Block) and isinstance(block.mlp, MoE)
        ]

    def update_router_bias(self, expert_loads: Tensor, speed: float) -> None:
        """One balancing step for every expert layer that ran; `expert_loads` as in Output. Exact, and nothing is drawn."""
        layers = self.moe_layers()
        trunk = len(layers) - (len(self.mtp) if layers else 0)
        if expert_loads.shape[0] not in (trunk, len(layers)):
            raise ValueError(
                f"Router balancing was given {expert_loads.shape[0]} rows of loads; the model has {trunk} expert layers"
                f"{' and a prediction layer' if self.mtp else ''}. Pass Output.expert_loads of this model."
            )
        for moe, loads_E in zip(layers, expert_loads, strict=False):
            moe.gate.update_bias(loads_E, speed)


def has_experts(config: ModelConfig, layer: int) -> bool:
    return config.ffn == "moe" and layer >= config.first_k_dense_replace
