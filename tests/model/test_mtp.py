"""The prediction layer: transformers' own reading of our folder, cached drafting, training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from bascule.config.model import ModelConfig
from bascule.errors import ModelFolderError
from bascule.model import count, weights
from bascule.model.pages import PagedCache, Pages
from bascule.model.transformer import Transformer

CONFIG = ModelConfig(preset="tick", num_nextn_predict_layers=1)


def _model(config: ModelConfig = CONFIG) -> Transformer:
    model = Transformer(config)
    weights.initialise(model, seed=0)
    return model


def _tokens() -> Tensor:
    return torch.randint(0, 128, (3, 16), generator=torch.Generator().manual_seed(1))


def test_transformers_runs_our_prediction_layer_with_equal_logits(tmp_path: Path) -> None:
    ours, tokens = _model().requires_grad_(False), _tokens()
    for moe in ours.moe_layers():
        moe.gate.e_score_correction_bias.copy_(torch.linspace(-0.2, 0.2, 8))
    weights.save_hf(ours, CONFIG, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    theirs._keys_to_ignore_on_load_unexpected = [
        r"model\.layers\.2.*"
    ]  # the class fixes DeepSeek-V3's own depth, 61
    mtp = MtpModel.from_pretrained(theirs)
    with torch.no_grad():
        hidden = theirs(tokens, output_hidden_states=True).hidden_states[-1]
        positions = torch.arange(1, 16).expand(3, -1)
        cache = MtpCache(config=theirs.config.get_mtp_config())
        ahead = mtp.forward_layer(0, hidden[:, :-1], positions, cache, input_ids=tokens[:, 1:])
        expected = mtp._project_to_logits(ahead)
    found = ours(tokens, ahead=True).ahead_BTV
    assert found is not None
    assert (found - expected).abs().max() < 1e-4 * expected.pow(2).mean().sqrt()


def test_a_folder_with_a_prediction_layer_comes_back_bit_equal(tmp_path: Path) -> None:
    weights.save_hf(_model(), CONFIG, tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    for part in (
        "enorm",
        "hnorm",
        "eh_proj",
        "shared_head.norm",
        "shared_head.head",
        "embed_tokens",
        "mlp.gate",
    ):
        assert f"model.layers.2.{part}.weight" in names
    again, config = weights.load_hf(tmp_path)
    assert config.num_nextn_predict_layers == 1
    assert weights.fingerprint(again) == weights.fingerprint(_model())


def test_a_folder_that_promises_a_layer_it_lacks_loads_without_it(tmp_path: Path) -> None:
    """transformers writes `num_nextn_predict_layers: 1` and drops the layer when it saves."""
    weights.save_hf(_model(), CONFIG, tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    model, config = weights.load_hf(tmp_path / "again")
    assert config.num_nextn_predict_layers == 0
    assert torch.equal(model(_tokens()).logits_BTV, _model()(_tokens()).logits_BTV)


def test_a_copy_that_differs_from_the_trunk_is_refused(tmp_path: Path) -> None:
    weights.save_hf(_model(), CONFIG, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.2.shared_head.head.weight"] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelFolderError, match="differs from the trunk's"):
        weights.load_hf(tmp_path)


def test_drafting_from_a_cache_equals_drafting_over_the_whole() -> None:
    model, tokens = _model().requires_grad_(False), _tokens()
    output = model(tokens, ahead=True)
    assert output.ahead_BTV is not None
    pages = Pages(model.config, 6, torch.device("cpu"), torch.float32, layers=1)
    pages.clean(range(7))
    tables = np.array([[1, 2], [3, 4], [5, 6]])
    for at, pieces in ((0, 4), (4, 1), (5, 10)):
        cache = PagedCache(pages, tables, np.full(3, at), first=1)
        logits, _, _ = model.draft(
            output.hidden_BTD[:, at : at + pieces], tokens[:, at + 1 : at + 1 + pieces], cache=cache
        )
        torch.testing.assert_close(
            logits, output.ahead_BTV[:, at : at + pieces], rtol=1e-4, atol=1e-5
        )


def test_the_layer_sees_one_token_further_and_no_more() -> None:
    model, tokens = _model().requires_grad_(False), _tokens()
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 128
    before, after = model(tokens, ahead=True).ahead_BTV, model(changed, ahead=True).ahead_BTV
    assert before is not None and after is not None and before.shape[1] == 15
    torch.testing.assert_close(before[:, :8], after[:, :8])
    assert (before[:, 8] - after[:, 8]).abs().max() > 1e-3


def test_the_layer_learns_and_its_router_is_balanced() -> None:
    model, tokens = _model(), _tokens()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        output = model(tokens, ahead=True)
        assert output.ahead_BTV is not None and output.expert_loads is not None
        loss = F.cross_entropy(output.ahead_BTV[:, :-1].flatten(0, 1), tokens[:, 2:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_router_bias(output.expert_loads, 1e-3)
    assert loss < 0.5
    assert output.expert_loads.shape == (2, 8)
    assert model.moe_layers()[1].gate.e_score_correction_bias.abs().max() > 0


def test_the_layer_rests_unless_asked() -> None:
    model = _model()
    output = model(_tokens())
    assert output.ahead_BTV is None and output.expert_loads is not None
    model.update_router_bias(output.expert_loads, 1e-3)
    assert model.moe_layers()[1].gate.e_score_correction_bias.abs().max() == 0
    with pytest.raises(ValueError, match="given 5 rows"):
        model.update_router_bias(torch.zeros(5, 8), 1e-3)


def test_a_model_without_the_layer_says_so() -> None:
    with pytest.raises(ValueError, match="num_nextn_predict_layers=0"):
        _model(ModelConfig(preset="tick"))(_tokens(), ahead=True)


def test_the_count_includes_the_layer_when_asked() -> None:
    assert count.parameters(CONFIG, mtp=True) == sum(p.numel() for p in _model().parameters())
