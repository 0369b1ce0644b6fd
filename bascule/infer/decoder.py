"""The decoding step as one call of compiled code (cpp/decode.cpp), for every model that `model/` can make, in fp32 and int8 on the CPU.

A step in torch is thousands of calls between the products; this is one. The numbers are the model's, up to rounding, and a row's bits
depend on that row alone. It bypasses torch, so on a simulated chip no fault of inference could act on it: engine.py refuses it there.

Letters: B rows, M blocks of a row, D hidden, V vocabulary, N pairs, H heads, C latent, E experts, F expert size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bascule.infer import large_pages
from bascule.infer.compiled import Matrix, Panels, compiled, laid
from bascule.infer.linear import LEAST_WEIGHTS, PanelLinear
from bascule.model.attention import GroupedQueryAttention, LatentAttention
from bascule.model.block import Block, PredictionLayer
from bascule.model.moe import MoE
from bascule.model.pages import Pages
from bascule.model.transformer import Transformer

KEPT_LOGITS = 1 << 20
Pointer, Number, Real = ctypes.c_void_p, ctypes.c_long, ctypes.c_float


class _Experts(ctypes.Structure):
    _fields_ = [
        ("router", Matrix),
        *((name, Pointer) for name in ("bias", "up", "down")),
        *((name, Number) for name in ("count", "size", "chosen", "groups", "kept_groups", "normalise")),
        ("scaling", Real),
    ]  # fmt: skip


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, Pointer) for name in ("norm", "ffn_norm", "q_gain", "k_gain")),
        *((name, Matrix) for name in ("q_low", "q", "k", "v", "o", "key", "value", "gate", "up", "down")),
        ("experts", _Experts),
        ("keys", Pointer),
        ("values", Pointer),
    ]  # fmt: skip


class _Model(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(_Layer)),
        ("count", Number),
        ("embedding", Pointer),
        ("norm", Pointer),
        ("head", Matrix),
        ("next_norm", Pointer),
        ("hidden_norm", Pointer),
        ("pair", Matrix),
        ("cos", Pointer),
        ("sin", Pointer),
        *((name, Number) for name in ("hidden", "heads", "kv_heads", "key", "value", "rope", "neighbours", "latent", "nope", "v_head", "blocks")),
        ("eps", Real),
        ("scale", Real),
    ]  # fmt: skip


class Decoder:
    """For the present weights of `model`, which linear.lay_out may have made, and its pages. Ask `compiled` first."""

    def __init__(self, model: Transformer, pages: Pages, ahead: Pages | None = None) -> None:
        self._width = model.config.hidden_size
        self._kept: list[object] = [pages, ahead]
        self._logits_BV: Tensor | None = None
        self._coarse = False
        self._head = self._panels(model.lm_head)
        library = compiled()
        assert library is not None
        self._decode = library.decode
        decoder = model.model
        blocks = [block for block in decoder.layers if isinstance(block, Block)]
        self._trunk = self._model(model, blocks, pages, decoder.norm.weight)
        self._ahead: _Model | None = None
        if ahead is not None:
            self._coarse = True
            self._ahead_head = self._panels(model.lm_head)
            layer = model.mtp[0]
            assert isinstance(layer, PredictionLayer)
            self._ahead = self._model(model, [layer.block], ahead, layer.norm.weight)
            self._ahead.next_norm = self._at(layer.enorm.weight)
            self._ahead.hidden_norm = self._at(layer.hnorm.weight)
            self._ahead.pair = self._matrix(layer.eh_proj)

    def step(
        self, tokens_B: Sequence[int], tables_BM: NDArray[np.int64], read_B: NDArray[np.int64]
    ) -> tuple[Tensor, Tensor]:
        """One more token for every row, which has `read_B` tokens in its blocks; the logits after it, (B, V), and the hidden state,
        (B, D). A row may follow another of the same blocks, one token further. The next step may write over the logits."""
        hidden_BD = self._run(self._trunk, tokens_B, None, tables_BM, read_B, first=0)
        return self._head.product(hidden_BD, self._room(len(tokens_B))), hidden_BD

    def _room(self, rows: int) -> Tensor | None:
        """Where many logits go: fresh memory of some 50 MB is 12,000 page faults a step, 2 % of it. Few are cheaper where they come."""
        if rows * self._head.record.n < KEPT_LOGITS:
            return None
        if self._logits_BV is None or self._logits_BV.shape[0] < rows:
            self._logits_BV = large_pages.take((rows, self._head.record.n), torch.float32)
        return self._logits_BV[:rows]

    def draft(
        self, hidden_ND: Tensor, tokens_N: Sequence[int], tables_NM: NDArray[np.int64], slots_N: NDArray[np.int64], last: Sequence[int]
    ) -> Tensor:  # fmt: skip
        """Append pairs in their slots; the logits of what follows those that `last` names."""
        assert self._ahead is not None
        ahead_ND = self._run(self._ahead, tokens_N, hidden_ND, tables_NM, slots_N - 1, first=1)
        return self._ahead_head.product(ahead_ND if len(last) == len(tokens_N) else ahead_ND[last])

    def _run(
        self, model: _Model, tokens: Sequence[int], before: Tensor | None, tables: NDArray[np.int64], read: NDArray[np.int64], *, first: int
    ) -> Tensor:  # fmt: skip
        ids = np.array(tokens, dtype=np.int64)
        tables, read = np.ascontiguousarray(tables), np.ascontiguousarray(read)
        hidden = torch.empty(len(ids), self._width)
        earlier = None if before is None else before.contiguous()
        self._decode(
            ctypes.byref(model), ids.ctypes.data, None if earlier is None else earlier.data_ptr(), tables.ctypes.data,
            read.ctypes.data, len(ids), tables.shape[1], first, hidden.data_ptr(),
        )  # fmt: skip
        return hidden

    def _model(self, model: Transformer, blocks: Sequence[Block], pages: Pages, norm_D: Tensor) -> _Model:  # fmt: skip
        config, rotary = model.config, model.model.rotary
        layers = (_Layer * len(blocks))(*(self._layer(block, pages, at) for at, block in enumerate(blocks)))  # fmt: skip
        self._kept.append(layers)
        attention = blocks[0].self_attn
        latent = isinstance(attention, LatentAttention)
        width = pages.pools[0].shape[4]
        return _Model(
            layers=layers, count=len(blocks), embedding=self._at(model.model.embed_tokens.weight), norm=self._at(norm_D),
            head=self._head.record, cos=self._at(rotary.cos_PR), sin=self._at(rotary.sin_PR), hidden=config.hidden_size,
            heads=config.num_attention_heads, kv_heads=pages.pools[0].shape[1], key=width,
            value=config.kv_lora_rank if latent else width, rope=rotary.size, neighbours=rotary.pairing == "neighbours", latent=latent,
            nope=config.qk_nope_head_dim, v_head=config.v_head_dim, blocks=pages.pools[0].shape[2], eps=config.rms_norm_eps,
            scale=attention.scale if isinstance(attention, LatentAttention) else width**-0.5,
        )  # fmt: skip

    def _layer(self, block: Block, pages: Pages, at: int) -> _Layer:
        layer = _Layer(
            norm=self._at(block.input_layernorm.weight),
            ffn_norm=self._at(block.post_attention_layernorm.weight),
            keys=pages.pools[0][at].data_ptr(),
            values=pages.pools[-1][at].data_ptr(),
        )
        if isinstance(block.self_attn, LatentAttention):
            self._latent(layer, block.self_attn)
        else:
            assert isinstance(block.self_attn, GroupedQueryAttention)
            self._grouped(layer, block.self_attn)
        dense = block.mlp
        if isinstance(dense, MoE):
            layer.experts = self._experts(dense)
            dense = dense.shared_experts
        layer.gate, layer.up, layer.down = map(self._matrix, (dense.gate_proj, dense.up_proj, dense.down_proj))  # fmt: skip
        return layer

    def _grouped(self, layer: _Layer, attention: GroupedQueryAttention) -> None:
        layer.q, layer.k, layer.v, layer.o = map(
            self._matrix, (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        )
        if attention.q_norm is not None and attention.k_norm is not None:
            layer.q_gain, layer.k_gain = self._at(attention.q_norm.weight), self._at(attention.k_norm.weight)  # fmt: skip

    def _latent(self, layer: _Layer, attention: LatentAttention) -> None:
        if attention.low_rank_queries:
            layer.q_low, layer.q = self._matrix(attention.q_a_proj), self._matrix(attention.q_b_proj)  # fmt: skip
            layer.q_gain = self._at(attention.q_a_layernorm.weight)
        else:
            layer.q = self._matrix(attention.q_proj)
        layer.k, layer.o = self._matrix(attention.kv_a_proj_with_mqa), self._matrix(attention.o_proj)  # fmt: skip
        layer.k_gain = self._at(attention.kv_a_layernorm.weight)
        heads_HPC = torch.unflatten(attention.kv_b_proj.weight.detach(), 0, (attention.heads, -1))
        keys_HNC, values_HVC = torch.split(heads_HPC, [attention.nope, attention.value], 1)
        layer.key, layer.value = self._stack(keys_HNC.transpose(1, 2)), self._stack(values_HVC)

    def _experts(self, moe: MoE) -> _Experts:
        gate, count = moe.gate, moe.gate.weight.shape[0]
        return _Experts(
            router=self._stack(gate.weight.unsqueeze(0)), bias=self._at(gate.e_score_correction_bias),
            up=self._stack(moe.experts.gate_up_proj).w, down=self._stack(moe.experts.down_proj).w, count=count,
            size=moe.experts.down_proj.shape[2], chosen=gate.per_token, groups=gate.groups, kept_groups=gate.kept_groups,
            normalise=gate.normalise, scaling=gate.scaling,
        )  # fmt: skip

    def _stack(self, weights_HNK: Tensor) -> Matrix:
        """The first of several matrices whose panels follow each other."""
        panels = laid(weights_HNK)
        self._kept.append(panels)
        return Matrix(panels.data_ptr(), None, None, *weights_HNK.shape[1:])

    def _matrix(self, linear: nn.Module) -> Matrix:
        return self._panels(linear).record

    def _panels(self, linear: nn.Module) -> Panels:
        """The panels that a laid out matrix has already, or new ones; of the prediction layer's large ones in int8, because a guess
        need only be likely, and reading the head again in fp32 costs a large model a fifth of a step."""
        assert isinstance(linear, nn.Linear | PanelLinear)
        if self._coarse and linear.weight.numel() >= LEAST_WEIGHTS:
            panels = PanelLinear(linear, torch.int8).panels
        elif isinstance(linear, PanelLinear):
            panels = linear.panels
        else:
            panels = Panels.of(linear.weight, bias_N=linear.bias)
        self._kept.append(panels)
        return panels

    def _at(self, weight: Tensor) -> int:
        kept = weight.detach().contiguous()
        self._kept.append(kept)
        return kept.data_ptr()
