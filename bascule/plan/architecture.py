"""A model as the planner sees it: sizes in, parameters, FLOPs and cache bytes out. Torch-free, exact from the architecture.

Counts follow
planner.md section 7: a token costs `6 * matmul weights used + 3 * attention forward`; embedding look-ups are free.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from bascule.config.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Multi-head latent attention's sizes. `q_lora` None: queries are projected directly."""

    q_lora: int | None
    kv_lora: int
    nope: int
    rope: int
    v: int


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One decoder-only model. Widths count elements; `shared_ffn` is the summed width of all shared experts.

    `dense_layers` use a dense feed-forward of width `ffn`, the others `topk` of `experts` of width `moe_ffn`.
    `local_layers` of the layers see only `window` tokens back. `gated`: three feed-forward matrices instead of two.
    `node_limit`: groups of experts that one token may reach (0: no limit). `selected`: positions sparse attention reads at
    most (0: all of them), chosen by an index that multiplies `index_width` numbers for each position it looks over.
    `cache_share`: cached bytes over those of a full cache (compressed attention, an index beside it).
    """

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    gated: bool = True
    tied: bool = False
    latent: Latent | None = None
    experts: int = 0
    topk: int = 0
    moe_ffn: int = 0
    shared_ffn: int = 0
    dense_layers: int = 0
    mtp_layers: int = 0
    window: int = 0
    local_layers: int = 0
    node_limit: int = 0
    selected: int = 0
    index_width: int = 0
    cache_share: float = 1.0

    @cached_property
    def moe(self) -> bool:
        return self.experts > 0

    @cached_property
    def moe_layers(self) -> int:
        return self.layers - self.dense_layers if self.moe else 0

    @cached_property
    def attention_weights(self) -> int:
        """Matmul weights of one layer's attention."""
        h = self.hidden
        if self.latent is None:
            return h * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        m = self.latent
        query = (
            h * m.q_lora + m.q_lora * self.heads * (m.nope + m.rope)
            if m.q_lora
            else h * self.heads * (m.nope + m.rope)
        )
        latent = h * (m.kv_lora + m.rope) + m.kv_lora * self.heads * (m.nope + m.v)
        return query + latent + self.heads * m.v * h

    @cached_property
    def dense_ffn_weights(self) -> int:
        return (3 if self.gated else 2) * self.hidden * self.ffn

    @cached_property
    def expert_weights(self) -> int:
        """Matmul weights of one routed expert."""
        return (3 if self.gated else 2) * self.hidden * self.moe_ffn

    @cached_property
    def shared_weights(self) -> int:
        return (3 if self.gated else 2) * self.hidden * self.shared_ffn

    @cached_property
    def router_weights(self) -> int:
        return self.hidden * self.experts

    @cached_property
    def head_weights(self) -> int:
        return self.hidden * self.vocab

    def layer_weights(self, *, active: bool, moe: bool) -> int:
        """Matmul weights of one layer; `active`: only those one token uses."""
        if not moe:
            return self.attention_weights + self.dense_ffn_weights
        routed = (self.topk if active else self.experts) * self.expert_weights
        return self.attention_weights + routed + self.shared_weights + self.router_weights

    @cached_property
    def mtp_weights(self) -> int:
        """Active matmul weights of one multi-token-prediction module, its projection and use of the head included."""
        return (
            self.layer_weights(active=True, moe=self.moe) + 2 * self.hidden**2 + self.head_weights
        )

    @cached_property
    def parameters(self) -> int:
        """Weights held in memory, embeddings included; norms and biases (under 0.1 %) left out."""
        body = self.moe_layers * self.layer_weights(active=False, moe=True)
        body += (self.layers - self.moe_layers) * self.layer_weights(active=False, moe=False)
        mtp = self.mtp_layers * (
            self.layer_weights(active=False, moe=self.moe) + 2 * self.hidden**2
        )
        return body + mtp + self.head_weights * (1 if self.tied else 2)

    @cached_property
    def expert_parameters(self) -> int:
        """Parameters that expert parallelism divides."""
        return (
            (self.moe_layers + (self.mtp_layers if self.moe else 0))
            * self.experts
            * self.expert_weights
        )

    @cached_property
    def active_weights(self) -> int:
        """Matmul weights one trained token uses in all, head and MTP included."""
        body = self.moe_layers * self.layer_weights(active=True, moe=True)
        body += (self.layers - self.moe_layers) * self.layer_weights(active=True, moe=False)
        return body + self.head_weights + self.mtp_layers * self.mtp_weights

    def attention_flops(self, sequence: int, *, saved: float = 1.0) -> float:
        """Forward score and value FLOPs of one token in all layers, causal, averaged over a sequence of this length.

        `saved`: share of what a window could save that is saved (kernels skip whole blocks only, some none).
        """
        widths = (
            2 * self.head_dim
            if self.latent is None
            else self.latent.nope + self.latent.rope + self.latent.v
        )
        full = self.positions(sequence)
        near = (
            full
            if self.window <= 0 or self.window >= sequence
            else self.window - self.window**2 / (2 * sequence)
        )
        near = full - saved * (full - near)
        layers = self.layers + self.mtp_layers
        looked_over = 2 * self.index_width * layers * sequence / 2
        return looked_over + (
            2
            * self.heads
            * widths
            * (self.local_layers * near + (layers - self.local_layers) * full)
        )

    def positions(self, sequence: int) -> float:
        """Positions a token of a causal sequence of this length attends to on average, windows aside."""
        if not 0 < self.selected < sequence:
            return sequence / 2
        return self.selected - self.selected**2 / (2 * sequence)

    def train_flops(self, sequence: int) -> float:
        """Model FLOPs of one trained token: forward and backward, recomputation not counted."""
        return 6 * self.active_weights + 3 * self.attention_flops(sequence)

    def cached(self, context: float) -> float:
        """Tokens' worth of a whole token's cache that a context of this many tokens keeps: a window's layers keep no more."""
        if not 0 < self.window < context:
            return context
        return context - self.local_layers / self.layers * (context - self.window)

    def cache_bytes(self, *, element_bytes: float = 2) -> float:
        """Key-value (or latent) cache of one token over all layers."""
        width = (
            2 * self.kv_heads * self.head_dim
            if self.latent is None
            else self.latent.kv_lora + self.latent.rope
        )
        return width * self.layers * element_bytes * self.cache_share


def from_config(config: ModelConfig, *, name: str | None = None) -> Shape:
    """The recipe's model."""
    moe = config.ffn == "moe"
    mla = config.attention == "mla"
    latent = Latent(
        q_lora=config.q_lora_rank,
        kv_lora=config.kv_lora_rank,
        nope=config.qk_nope_head_dim,
        rope=config.qk_rope_head_dim,
        v=config.v_head_dim,
    )
    return Shape(
        name=name or config.preset,
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        ffn=config.intermediate_size,
        vocab=config.vocab_size,
        tied=config.tie_word_embeddings,
        latent=latent if mla else None,
        experts=config.n_routed_experts if moe else 0,
        topk=config.num_experts_per_tok if moe else 0,
        moe_ffn=config.moe_intermediate_size if moe else 0,
        shared_ffn=config.n_shared_experts * config.moe_intermediate_size if moe else 0,
        dense_layers=min(config.first_k_dense_replace, config.num_hidden_layers)
        if moe
        else config.num_hidden_layers,
        mtp_layers=config.num_nextn_predict_layers,
        node_limit=config.topk_group if moe and config.n_group > 1 else 0,
    )
