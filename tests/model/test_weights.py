"""First values, fingerprints, what a written folder holds, and which folders are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bascule.config.model import ModelConfig
from bascule.errors import ModelFolderError
from bascule.model import origin, weights
from bascule.model.transformer import Transformer

TICK = ModelConfig(preset="tick")


def _model(config: ModelConfig = TICK, seed: int = 0) -> Transformer:
    model = Transformer(config)
    weights.initialise(model, seed)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    weights.save_hf(_model(), TICK, tmp_path)
    return tmp_path


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_first_values_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = weights.fingerprint(_model())
    torch.manual_seed(2)
    assert weights.fingerprint(_model()) == first
    assert weights.fingerprint(_model(seed=1)) != first


def test_first_values_are_equal_in_another_process() -> None:
    code = (
        "from bascule.config.model import ModelConfig; from bascule.model import weights; from bascule.model.transformer import Transformer\n"
        "model = Transformer(ModelConfig(preset='tick')); weights.initialise(model, 0); print(weights.fingerprint(model))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()
    assert found == weights.fingerprint(_model())


def test_first_logits_have_a_deviation_of_about_one() -> None:
    logits = _model().requires_grad_(False)(torch.arange(100)[None]).logits_BTV
    assert logits.isfinite().all() and 0.5 < float(logits.std()) < 2.0


def test_a_single_bit_changes_the_fingerprint() -> None:
    model = _model()
    before = weights.fingerprint(model)
    with torch.no_grad():
        model.model.norm.weight.view(torch.int32)[3] ^= 1
    assert weights.fingerprint(model) != before


def test_the_fingerprint_covers_names_shapes_and_dtypes() -> None:
    zeros = torch.zeros(4, 2)
    prints = {
        weights.fingerprint_state(state)
        for state in (
            {"a": zeros},
            {"b": zeros},
            {"a": zeros.T.contiguous()},
            {"a": zeros.to(torch.int32)},
            {},
        )
    }
    assert len(prints) == 5


def test_a_folder_comes_back_bit_equal(folder: Path) -> None:
    model, config = weights.load_hf(folder)
    assert weights.fingerprint(model) == weights.fingerprint(_model())
    assert weights.fingerprint(Transformer(config)) != weights.fingerprint(model)


def test_a_bf16_folder_stays_bf16_with_an_fp32_router_bias(tmp_path: Path) -> None:
    model = _model().to(torch.bfloat16)
    model.moe_layers()[0].gate.e_score_correction_bias.fill_(0.1)
    weights.save_hf(model, TICK, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    again, _ = weights.load_hf(tmp_path)
    assert weights.fingerprint(again) == weights.fingerprint(model)


def test_config_json_carries_what_other_engines_need(folder: Path) -> None:
    written = json.loads((folder / "config.json").read_text())
    expected = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "topk_method": "noaux_tc",
        "scoring_func": "sigmoid", "rope_theta": 10000.0, "rope_interleave": True, "moe_layer_freq": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "rope_scaling": None, "dtype": "float32",
        "torch_dtype": "float32", "num_nextn_predict_layers": 0, "num_key_value_heads": 4, "hidden_act": "silu",
        "attention_bias": False, "norm_topk_prob": True, "first_k_dense_replace": 1, "tie_word_embeddings": True,
    }  # fmt: skip
    assert {name: written.get(name, "absent") for name in expected} == expected


def test_experts_lie_one_by_one_on_disk(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    assert tensors["model.layers.1.mlp.experts.7.gate_proj.weight"].shape == (192, 64)
    assert tensors["model.layers.1.mlp.experts.7.down_proj.weight"].shape == (64, 192)
    assert tensors["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"].shape == (40, 64)
    assert tensors["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert "lm_head.weight" not in tensors and not any("gate_up" in name for name in tensors)


def test_ids_and_tokenizer_files_are_written(tmp_path: Path) -> None:
    source = tmp_path / "tokenizer.json"
    source.write_text("{}")
    weights.save_hf(
        _model(),
        TICK,
        tmp_path / "out",
        [source],
        special_ids={"eos_token_id": 2, "pad_token_id": 0},
    )
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] == 0
    assert (
        json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 2
    )


def test_sharded_folders_load(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weights.fingerprint(weights.load_hf(folder)[0]) == weights.fingerprint(_model())
    (folder / "b.safetensors").unlink()
    with pytest.raises(ModelFolderError, match="b.safetensors"):
        weights.load_hf(folder)


@pytest.mark.parametrize("keep", [0, 5, 2000, -1])
def test_a_torn_weight_file_is_refused(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelFolderError, match="torn"):
        weights.load_hf(folder)


def test_a_missing_weight_file_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelFolderError, match="neither model.safetensors nor"):
        weights.load_hf(folder)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ModelFolderError, match="config.json"):
            weights.load_hf(path)


def test_a_damaged_config_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(ModelFolderError, match="not readable JSON"):
        weights.load_hf(folder)


REFUSED: dict[str, Any] = {
    "model_type": "mixtral", "hidden_act": "gelu", "topk_method": "greedy", "scoring_func": "softmax",
    "rope_interleave": False, "rope_scaling": {"type": "yarn", "factor": 4.0}, "quantization_config": {"bits": 8},
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}, "kv_lora_rank": "many", "n_group": 3,
}  # fmt: skip


@pytest.mark.parametrize("key", REFUSED)
def test_a_config_that_means_another_computation_is_refused(folder: Path, key: str) -> None:
    _edit(folder, **{key: REFUSED[key]})
    with pytest.raises(ModelFolderError):
        weights.load_hf(folder)


def test_a_config_without_a_size_is_refused_rather_than_filled_in(folder: Path) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    del raw["kv_lora_rank"]
    path.write_text(json.dumps(raw))
    with pytest.raises(ModelFolderError, match="lacks kv_lora_rank"):
        weights.load_hf(folder)


def test_missing_foreign_and_misshapen_tensors_are_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.surprise"] = torch.zeros(1)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelFolderError) as caught:
        weights.load_hf(folder)
    for part in (
        "model.surprise is not part",
        "model.norm.weight is missing",
        "up_proj.weight has shape [3, 3]",
    ):
        assert part in str(caught.value)


def test_experts_with_gqa_have_no_family(tmp_path: Path) -> None:
    config = ModelConfig(preset="tick", attention="gqa")
    with pytest.raises(ModelFolderError, match="'gqa' and ffn 'moe'"):
        weights.save_hf(_model(config), config, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shape", [{"preset": "tick"}, {"depth": 2, "num_nextn_predict_layers": 1}, {"preset": "nano", "attention": "gqa", "ffn": "swiglu"}])  # fmt: skip
def test_what_we_write_holds_as_many_parameters_as_its_config_means(
    shape: dict[str, object], tied: bool, tmp_path: Path
) -> None:
    config = ModelConfig.model_validate({**shape, "tie_word_embeddings": tied})
    weights.save_hf(_model(config), config, tmp_path)
    origin.refuse_torn(tmp_path)
