"""Runs of the user's own: read from words, refused where they cannot be, and what they do to the answers."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path

import numpy as np
import pytest

from bascule.config.recipe import Recipe
from bascule.errors import RecipeError
from bascule.folder import RunFolder
from bascule.ledger import Ledger
from bascule.plan.anchor import knowing, read_anchor
from bascule.plan.answer import answer
from bascule.plan.fit import DATA, usable
from bascule.plan.models import model_named
from bascule.plan.page import render_page
from bascule.plan.regress import OWN
from bascule.plan.render import cli_text, to_json
from bascule.plan.runs_table import read_rows
from bascule.records import Evidence, RecipeResolved, StepStats

ROWS = [row for row in read_rows(DATA / "runs.csv") if usable(row)]
OURS = "64 x H800, seq 8k, batch 512, TP4 PP4 MB1, 1,250 tokens/s/chip"
LLAMA = model_named("llama-3-70b")


def test_an_anchor_is_read_and_the_model_may_be_another() -> None:
    (one,) = read_anchor(OURS, LLAMA)
    assert one.value == 1250 and one.job.layout.dp == 4 and one.job.shape.name == "llama-3.1-70b"
    (other,) = read_anchor(OURS + ", llama-3-8b", LLAMA)
    assert other.job.shape.name == "llama-3.1-8b"
    (total,) = read_anchor(OURS.replace("1,250 tokens/s/chip", "80k tok/s in all"), LLAMA)
    (step,) = read_anchor(OURS.replace("1,250 tokens/s/chip", "52.4288 s a step"), LLAMA)
    assert total.value == step.value == pytest.approx(1250)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("64 x H800, 410 tokens/s", "'410 tokens/s/chip' or '410 tokens/s in all'"),
        ("64 x H800, measured 410", "needs its unit"),
        ("64 x H800, 41 % MFU", "differ by up to 1.6x"),
        ("64 x H800, 12 s a step", "without the batch"),
        ("64 x H800, -4 tokens/s/chip", "above 0"),
        ("64 x H800, 0 tokens/s/chip", "above 0"),
        ("64 x H800, 400k tokens/s/chip", r"up to 4,\d+ tokens/s/chip is allowed"),
        ("64 x H800, llama-3-71b, 410 tokens/s/chip", "Did you mean 'llama-3-70b'"),
        ("64 x H800, llama-3-8b, v3, 410 tokens/s/chip", "names 2 models"),
        ("64 x H800, seq 8k", "does not say how fast it ran"),
        ("64 x H8000, 410 tokens/s/chip", "Did you mean 'h800'"),
        ("64 x H800, TP3, 410 tokens/s/chip", "multiple of TP x PP x CP = 3"),
        ("410 tokens/s/chip", "does not start with a number of chips"),
        ("32 x H800, 4k in, 1k out, 50 ms", "does not say how fast it served"),
        ("32 x H800, 4k in, 1k out, decode 900 tokens/s/chip", "add for instance '50 ms'"),
        ("32 x H800, 4k in, 50 ms, 900 tokens/s/chip", "which tokens it counts"),
        ("32 x H800, 4k in, 50 ms, decode 900 tokens/s in all", "of one chip"),
        ("32 x H800, 4k in, 50 ms, decode 90M tokens/s/chip", "at its peak"),
    ],
)  # fmt: skip
def test_what_cannot_be_an_anchor_is_refused_in_one_sentence(text: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says) as refused:
        read_anchor(text, LLAMA)
    assert "\n" not in str(refused.value)


def test_a_published_run_given_as_an_anchor_brings_its_sisters_nearer() -> None:
    """`benchmarks/plan_anchor.py` on whole tables (measured: 17.6 to 13.5 % at the median, 0.81 of the mean)."""
    bench = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "plan_anchor.py"))
    found = bench["compare"](ROWS, tables=True, least=5)
    missed, narrow = ([np.mean([abs(one.error) for one in side]) for side in (found.before, found.after)],
                      [bench["interval"](side) for side in (found.before, found.after)])  # fmt: skip
    assert len(found.before) > 130
    assert missed[1] < 0.9 * missed[0] and narrow[1] < 0.9 * narrow[0]


@pytest.fixture(scope="module")
def anchored():  # type: ignore[no-untyped-def]
    return answer(
        "llama-3-70b",
        train=["512 x H800, 2T tokens, seq 8k"],
        versus=["1024 x Ascend 910C"],
        anchors=[OURS],
    )


def test_an_anchor_moves_what_is_like_it_narrows_it_and_is_named(anchored) -> None:  # type: ignore[no-untyped-def]
    one, other = anchored.trainings
    before, now = one.without_own, one.tokens_per_s_chip
    assert now.high / now.low < before.high / before.low
    assert now.value < before.value  # it ran slower than forecast
    assert "64 x H800 SXM trained llama-3.1-70b at 1,250 tokens/s per chip" in one.step.basis
    assert "224 published runs" in one.step.basis
    assert other.tokens_per_s_chip.value == pytest.approx(other.without_own.value, rel=0.05)


def test_an_anchor_is_seen_in_text_json_and_page(anchored) -> None:  # type: ignore[no-untyped-def]
    words = anchored.anchors[0].words
    text, page = cli_text(anchored), render_page(anchored)
    plain = json.loads(json.dumps(to_json(anchored)))
    assert text.count(words) >= 2 and "published runs alone say" in text and "narrower" in text
    assert words in page and "published runs alone" in page
    assert plain["anchors"][0]["measured"] == 1250 and plain["anchors"][0]["forecast"]["low"] > 0
    assert plain["options"][0]["without_own"]["unit"] == "tokens/s per chip"
    silent = to_json(answer("llama-3-70b", train=["512 x H800, 2T tokens"]))
    assert silent["anchors"] == [] and silent["options"][0]["without_own"] is None


def test_an_option_that_says_what_was_measured_is_forecast_at_that(anchored) -> None:  # type: ignore[no-untyped-def]
    found = answer("llama-3-70b", train=["512 x H800, 2T tokens, seq 8k, measured 700k tokens/s in all"])  # fmt: skip
    (one,) = found.trainings
    assert one.tokens_per_s_chip.value == pytest.approx(700e3 / 512, rel=0.04)
    assert one.tokens_per_s_chip.high / one.tokens_per_s_chip.low < 1.12
    assert found.anchors[0].source == "as this option says" and not found.anchors[0].guessed


def test_an_anchor_far_from_its_forecast_is_taken_with_a_warning() -> None:
    found = answer("llama-3-70b", train=["512 x H800, 2T tokens"], anchors=[OURS.replace("1,250", "41")])  # fmt: skip
    assert found.anchors[0].odd and "check its unit" in found.notes[0]
    assert "check its unit" in cli_text(found)


def test_a_layout_that_was_not_given_teaches_less() -> None:
    given, guessed = (
        knowing(read_anchor(text, LLAMA)).training.process.points[-1]
        for text in (OURS, OURS.replace("TP4 PP4 MB1, ", ""))
    )
    assert guessed.family == given.family == OWN and guessed.noise > given.noise


def test_a_measured_service_is_an_anchor_of_services() -> None:
    words = "H800, 4k in, 1k out, 50 ms"
    plain = answer("deepseek-v3", serve=[words]).services[0]
    said = f"32 x {words}, decode 1400 tokens/s/chip, prefill 5k tokens/s/chip"
    found = answer("deepseek-v3", serve=[words], anchors=[said])
    one = found.services[0]
    assert one.decode[0] == pytest.approx(1400, rel=0.05)
    assert one.prefill[0] == pytest.approx(5000, rel=0.05)
    after, before = (math.log(side.decode[2] / side.decode[1]) for side in (one, plain))
    # What is left is the noise between two services of one kind: 1.64 from 2.01 wide; 1.51 from 3.85 before levels of single chips went.
    assert after < 0.75 * before and math.exp(after) < 1.7
    assert one.without_own == (plain.decode, plain.prefill)
    assert "published points alone say" in cli_text(found) and [
        a.of for a in found.anchors
    ] == ["decode", "prefill"]  # fmt: skip
    other = answer("deepseek-v3", serve=[f"32 x {words}, measured decode 1400 tokens/s/chip"])
    assert other.services[0].decode[0] == pytest.approx(1400, rel=0.05)


def run_of(folder: Path, *, seconds: float, hidden: int) -> Path:
    """A run that pretrained a model of four wide layers on `lab`, an H100 as qualify measured it."""
    place = RunFolder(folder)
    place.create()
    ledger = Ledger(place.ledger)
    recipe = Recipe.model_validate(
        {
            "name": "t",
            "pools": {"lab": {"accelerator": "cuda", "chips": 8}},
            "model": {"preset": "custom", "ffn": "swiglu", "attention": "gqa", "hidden_size": hidden, "num_hidden_layers": 32,
                      "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": max(2, hidden // 32), "intermediate_size": 3 * hidden,
                      "vocab_size": 32000, "max_position_embeddings": 4096},
            "pretrain": {"batch_sequences": 64, "sequence_length": 4096, "data": "shards"},
            "train": {"phases": ["pretrain"]},
        }
    )  # fmt: skip
    ledger.append(RecipeResolved(recipe_sha256="0", recipe=json.loads(recipe.model_dump_json())))
    seen = {"gemm_gflops": 6e5, "copy_gb_per_s": 3000.0, "attention_gflops": 3e5, "step_gflops": 2e5, "datasheet_chip": "H100 SXM"}  # fmt: skip
    ledger.append(
        Evidence(check="speed.step", family="speed", roles=("train",), outcome="pass", measured=seen, bound="", pool="lab")
    )  # fmt: skip
    for step in range(1, 12):
        ledger.append(
            StepStats(pool="lab", step=step, phase="pretrain", loss=1.0, grad_norm=1.0, learning_rate=1e-3, tokens=64 * 4096,
                      seconds=60.0 if step == 1 else seconds)
        )  # fmt: skip
    return folder


def test_a_runs_own_pretraining_is_an_anchor_of_its_pool(tmp_path: Path) -> None:
    found = answer("llama-3-8b", train=["64 x lab, 1T tokens, bf16"], chip_file=run_of(tmp_path / "r", seconds=4.0, hidden=4096))  # fmt: skip
    (one,) = found.anchors
    assert one.source == "the run's own pretraining"
    assert one.value == pytest.approx(64 * 4096 / 8 / 4.0)
    assert found.trainings[0].job.software == "bascule"
    before, now = found.trainings[0].without_own, found.trainings[0].tokens_per_s_chip
    assert now.high / now.low < 0.9 * before.high / before.low
    assert (now.value < before.value) == (one.ratio < 1)


def test_a_run_of_a_much_smaller_model_does_not_speak_for_a_large_one(tmp_path: Path) -> None:
    found = answer("llama-3-8b", train=["64 x lab, 1T tokens, bf16"], chip_file=run_of(tmp_path / "r", seconds=0.4, hidden=64))  # fmt: skip
    assert not found.anchors and "too few to speak for" in found.notes[0]
    assert found.trainings[0].job.software != "bascule"
