"""Exports: transformers reads them and says what we say; GGUF gives the weights and the ids back; the card tells the lineage."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from bascule.data import gguf_tokenizer
from bascule.data.text_tokenizer import open_tokenizer
from bascule.errors import UsageError
from bascule.folder import RunFolder
from bascule.ledger import Ledger, read_ledger
from bascule.model import existing
from bascule.model.weights import fingerprint, load_hf
from bascule.records import Incident, Migration, StepStats
from bascule.report.card import spans
from bascule.stages import export
from tests.existing import make_llama
from tests.serve.conftest import make_run


def exported(folder: RunFolder, **words: Any) -> Any:
    return export.main(Namespace(run=str(folder.root), **({"to": None, "gguf": False} | words)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Steps 1 to 4 on a simulated chip, 3 and 4 computed again elsewhere."""
    folder, _ = make_run(
        tmp_path_factory.mktemp("export") / "run", {"odd": "sim:clean", "main": "cpu"}
    )
    ledger = Ledger(folder.ledger)
    for pool, steps in (("odd", (1, 2, 3, 4)), ("main", (3, 4, 5))):
        for step in steps:
            ledger.append(
                StepStats(step=step, phase="sft", loss=1.0, grad_norm=1.0, learning_rate=1e-3, tokens=9, seconds=0.1, pool=pool)
            )  # fmt: skip
    ledger.append(
        Incident(
            incident_id="1", step=5, sentinel="checksum", attribution="persistent chip fault", action="moved",
            evidence="wrong product", pool="odd",
        )
    )  # fmt: skip
    ledger.append(
        Migration(
            from_pool="odd", to_pool="main", failed_at_step=4, resumed_from_step=2, steps_recomputed=2, seconds_lost=1.0, snapshot="s",
        )
    )  # fmt: skip
    return folder


def test_transformers_says_of_an_export_what_we_say(run: RunFolder) -> None:
    answer = exported(run)
    parity = answer.data["transformers"]
    assert answer.exit_code == 0
    assert parity["agrees"] and parity["worst_logprob_difference"] < parity["bound"] < 1e-4
    target = Path(answer.data["folder"])
    config = json.loads((target / "config.json").read_text())
    assert (config["topk_method"], config["scoring_func"]) == ("noaux_tc", "sigmoid")
    assert config["tie_word_embeddings"] is False
    assert config["num_key_value_heads"] == config["num_attention_heads"]
    assert config["eos_token_id"] == open_tokenizer(target).eos_id
    assert fingerprint(load_hf(target)[0]) == fingerprint(load_hf(run.model)[0])


def test_the_exported_tokenizer_writes_prompts_as_we_do(run: RunFolder, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    exported(run, to=str(tmp_path / "out"))
    messages = [{"role": "user", "content": "7+8-3=?"}]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    assert theirs == open_tokenizer(run.model).render(messages)


def test_other_weights_than_ours_end_with_exit_code_3(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would load the folder without a word if config.json turned pairs the other way."""
    written = export.save_hf

    def mistaken(model: Any, config: Any, folder: Path, *args: Any, **kwargs: Any) -> None:
        written(model, config, folder, *args, **kwargs)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"norm_topk_prob": False}))

    monkeypatch.setattr(export, "save_hf", mistaken)
    monkeypatch.setattr(export, "Reference", lambda model: _sound(run))
    assert exported(run, to=str(tmp_path / "out")).exit_code == 3


def _sound(run: RunFolder) -> Any:
    from bascule.infer.reference import Reference

    return Reference(load_hf(run.model)[0])


def test_the_card_says_which_chip_trained_which_steps(run: RunFolder) -> None:
    assert [(one.first, one.last, one.pool) for one in spans(read_ledger(run.ledger))] == [
        (1, 2, "odd"),
        (3, 5, "main"),
    ]
    card = (Path(exported(run).data["folder"]) / "README.md").read_text()
    assert "| 3 to 5 | sft | main |" in card
    assert "persistent chip fault" in card and "2 steps computed again" in card


@pytest.mark.parametrize("kind", ["ours", "llama"])
def test_gguf_gives_the_ids_back(kind: str, run: RunFolder, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the package gguf is not installed (extra gguf)")
    folder = run
    if kind == "llama":
        folder, _ = make_run(tmp_path / "run", {"main": "cpu"})
        for path in folder.model.iterdir():
            path.unlink()
        make_llama(folder.model)
    answer = exported(folder, to=str(tmp_path / "out"), gguf=True)
    path = Path(answer.data["gguf"])
    text = "9-8+0+7=?\nuser <think>7</think>"
    tokenizer = open_tokenizer(folder.model)
    assert gguf_tokenizer.load(path).encode(text) == tokenizer.encode(text)
    if kind == "llama":
        assert fingerprint(existing.load(path)[0]) == fingerprint(load_hf(folder.model)[0])


def test_the_runs_own_folder_is_not_written_over(run: RunFolder) -> None:
    with pytest.raises(UsageError, match="own model folder"):
        exported(run, to=str(run.model))
