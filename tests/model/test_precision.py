"""bf16 products beside fp32 weights: which products are narrow, and that router, head, norms and the residual stream are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bascule.config.model import ModelConfig
from bascule.dispatch import OperatorMode
from bascule.model import kernels, weights
from bascule.model.precision import computing, narrow, present, rounded
from bascule.model.transformer import Output, Transformer

CPU = torch.device("cpu")
SHAPES = {
    "mla and experts": dict(preset="tick"),
    "dense": dict(preset="tick", ffn="swiglu"),
    "low-rank queries": dict(preset="tick", q_lora_rank=16),
    "gqa": dict(preset="tick", attention="gqa", num_key_value_heads=2, qk_norm=True),
    "prediction layer": dict(preset="tick", num_nextn_predict_layers=1),
}


class Products(OperatorMode):
    """Types of the matrix products, by the size of their result."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "addmm", "bmm"):
            self.seen.setdefault(made.shape[-1], set()).add(made.dtype)
        return made


def model(**settings: object) -> Transformer:
    made = Transformer(ModelConfig(**{"vocab_size": 41, **settings}))  # type: ignore[arg-type]
    weights.initialise(made, 0)
    return made


def tokens() -> Tensor:
    return torch.arange(3 * 12).view(3, 12) % 40


def run(made: Transformer, precision: str, **how: object) -> Output:
    with computing(precision, CPU):  # type: ignore[arg-type]
        return made(tokens(), ahead=bool(made.mtp), **how)  # type: ignore[no-any-return]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_kind_of_model_says_nearly_the_same_in_bf16(shape: str) -> None:
    made = model(**SHAPES[shape])
    wide, narrowed = run(made, "fp32"), run(made, "bf16")
    assert not torch.equal(wide.logits_BTV, narrowed.logits_BTV)
    assert (wide.logits_BTV - narrowed.logits_BTV).norm() < 0.1 * wide.logits_BTV.norm()
    assert {narrowed.logits_BTV.dtype, narrowed.hidden_BTD.dtype} == {torch.float32}
    documents = (tokens() // 7).contiguous()
    mask = torch.ones(3, 12, dtype=torch.bool)
    apart = [run(made, one, documents=documents, mask=mask) for one in ("fp32", "bf16")]
    assert (apart[0].logits_BTV - apart[1].logits_BTV).norm() < 0.1 * apart[0].logits_BTV.norm()


def test_head_and_router_are_fp32_and_all_other_products_bf16() -> None:
    made = model(preset="tick")
    with Products() as products:
        output = run(made, "bf16")
    experts, vocabulary = made.config.n_routed_experts, made.config.vocab_size
    assert products.seen.pop(experts) == products.seen.pop(vocabulary) == {torch.float32}
    assert products.seen and set.union(*products.seen.values()) == {torch.bfloat16}
    assert torch.equal(output.logits_BTV, F.linear(output.hidden_BTD, made.lm_head.weight))


def test_a_router_chooses_alone_as_it_does_in_a_bf16_step() -> None:
    made, heard = model(preset="tick"), []
    made.moe_layers()[0].gate.register_forward_hook(lambda gate, had, gave: heard.append((had, gave)))  # fmt: skip
    run(made, "bf16")
    ((x_ND,), (chosen, weigh)) = heard[0]
    alone = made.moe_layers()[0].gate(x_ND)
    assert torch.equal(chosen, alone[0]) and torch.equal(weigh, alone[1])


def test_what_products_read_through_a_copy_is_neither_table_nor_head_nor_router_nor_gain() -> None:
    made = model(preset="tick", num_nextn_predict_layers=1, tie_word_embeddings=False)
    names = rounded(made)
    others = {name for name, _ in made.named_parameters()} - names
    assert {name for name in others if "norm" not in name} == {
        "model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.gate.weight", "mtp.0.block.mlp.gate.weight",
    }  # fmt: skip
    assert "mtp.0.eh_proj.weight" in names and "model.layers.1.mlp.experts.down_proj" in names


def test_nothing_is_entered_for_fp32_and_own_kernels_step_aside_for_bf16_alone() -> None:
    x = torch.ones(2, 2)
    with computing("fp32", CPU):
        assert present(CPU) == "fp32" and narrow(x) is x
        before = kernels.usable(x)
    with computing("bf16", CPU):
        assert present(CPU) == "bf16" and narrow(x).dtype == torch.bfloat16
        assert not kernels.usable(x)
    assert before is kernels.usable(x) is (kernels.compiled() is not None)
