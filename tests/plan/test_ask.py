"""What people type is read, and refused in one sentence when it cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from bascule.errors import RecipeError
from bascule.plan.answer import answer
from bascule.plan.ask import parse_serve, parse_train
from bascule.plan.catalogue import chips, chips_from_toml, find_chip, with_measured
from bascule.plan.models import model_named, named


def test_a_training_is_read() -> None:
    ask = parse_train("2048 x H800, 14.8T tokens")
    assert (ask.chips, ask.chip.name, ask.tokens, ask.precision, ask.price_usd_h) == (
        2048,
        "H800 SXM",
        14.8e12,
        "fp8",
        2.0,
    )


def test_every_part_may_be_given_in_any_order() -> None:
    ask = parse_train(
        "6,144 x Ascend 910C, seq 8k, 1.2 USD/h, bf16, batch 15360, pue 1.1, 4 failures, TP4 PP8 EP32, 2T tokens"
    )
    assert (
        ask.chips,
        ask.sequence,
        ask.price_usd_h,
        ask.batch,
        ask.pue,
        ask.failures,
        ask.tokens,
    ) == (6144, 8192, 1.2, 15360, 1.1, 4.0, 2e12)
    assert ask.layout is not None and ask.layout.dp == 6144 // 32


def test_a_service_is_read() -> None:
    ask = parse_serve("H20, 4k in, 1k out, 50 ms, ttft 2 s")
    assert (ask.chip.name, ask.prompt, ask.completion, ask.tpot_s, ask.ttft_s) == (
        "H20-96",
        4096,
        1024,
        0.05,
        2.0,
    )
    assert parse_serve("16 x H800, 30 ms").chips == 16


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("2048 x H8000, 1T tokens", "Did you mean 'h800'"),
        ("H800, 1T tokens", "number of chips"),
        ("2048 x H800", "how many tokens"),
        ("2048 x H800, 1T tokens, -2 USD/h", "cannot be negative"),
        ("2048 x H800, 1T tokens, 2/h", "no currency"),
        ("2048 x H800, 1T tokens, TP3", "multiple of TP x PP x CP = 3"),
        ("2048 x H800, 1T tokens, pue 9", "1.0 to 3.0"),
        ("2048 x H800, 1T tokens, colour blue", "not understood"),
        ("0 x H800, 1T tokens", "above 0"),
        ("2048 x H800, 1T", "write '1T tokens'.$"),
        ("2048 x H800, -1T tokens", "'-1T tokens': the number must be above 0"),
        ("2048 x H800, 1T tokens, -3 failures", "must be above 0"),
        ("2048 x H800, 1T tokens, 4096", "'seq 4096', 'batch 4096'"),
        ("2048 x H800, 1T tokens, 1.2.3 USD/h", "not understood"),
        ("2048 x H800, 1T tokens, 2 EUR/h", "in USD/h"),
        ("2048 x H800, 1T tokens, €2/h", "in USD/h"),
        ("2048 x H800, 15 trillion", "write '15T tokens'"),
        ("2048 x H800, 15e12", "write '15000000000000 tokens'"),
        (" , ", "does not start"),
        (
            "2048 x H800, 1T tokens, 2T tokens",
            "'1T tokens' and '2T tokens' say the same differently",
        ),
        ("2048 x H800, 1T tokens, seq 4k, fp8, seq 8k", "'seq 4k' and 'seq 8k'"),
        ("2048 x H800, 1T tokens, TP4, TP8 PP2", "gives a degree twice"),
        ("2048 x H800, 1T tokens, batch 3.5", "whole number above 0"),
        ("2048 x H800, 1T tokens, seq 1.5", "whole number above 0"),
        ("8 x NVIDIA H100 80GB HBM3, 1T tokens", "Did you mean 'h100'"),
        ("8 x H800 1T tokens", "Did you mean 'h800'. Parts are set apart by commas"),
    ],
)
def test_bad_trainings_are_refused_in_one_sentence(text: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        parse_train(text)


def test_what_is_said_twice_alike_or_with_other_commas_is_read() -> None:
    plain = parse_train("2048 x H800, 1T tokens, seq 8k, TP4 PP8")
    for text in ("2048 x H800; 1T tokens; seq 8k; TP4 PP8", "2048 x H800，1T tokens，seq 8k、TP4，PP8", "2048 x H800, 1T tokens, 1000B tokens, seq 8k, seq 8192, PP8, TP4"):  # fmt: skip
        ask = parse_train(text)
        assert (ask.tokens, ask.sequence, ask.layout) == (plain.tokens, plain.sequence, plain.layout)  # fmt: skip
    assert len(parse_serve("H20, measured decode 9 tokens/s/chip, measured prefill 9 tokens/s/chip").measured) == 2  # fmt: skip


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("H20, 50", "no unit"),
        ("H20, 0 ms", "above 0"),
        ("H2O, 50 ms", "not a chip"),
        ("H20, blue", "not understood"),
        ("", "names no chip"),
        ("H20, 1.2.3 ms", "not understood"),
        ("H20, 4k in, 50 ms, 8k in", "'4k in' and '8k in' say the same differently"),
        ("H20 4k in 1k out 50 ms", "Did you mean 'h20'. Parts are set apart by commas"),
    ],
)
def test_bad_services_are_refused(text: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        parse_serve(text)


def test_every_shipped_chip_has_a_source_and_no_recalled_figure() -> None:
    for chip in chips().values():
        assert chip.source, chip.name
        assert "recall" not in chip.source + chip.note
        assert chip.basis in ("datasheet", "assumed")
        if chip.price_usd_h is not None:
            assert chip.price_note, f"{chip.name}: a price needs its date and kind"


def test_a_users_own_chips_come_first_and_bad_keys_are_named(tmp_path: Path) -> None:
    path = tmp_path / "chips.toml"
    path.write_text('["My Chip"]\nbf16_tflops = 500.0\nmemory_gb = 96\n')
    own = chips_from_toml(path)
    assert find_chip("mychip", own).bf16_tflops == 500.0
    path.write_text('[chips."My Chip"]\nbf16_tflops = 500.0\nmemory_gb = 96\n')
    assert chips_from_toml(path) == own
    path.write_text('["My Chip"]\nbf16_tflop = 500.0\n')
    with pytest.raises(RecipeError, match="Did you mean 'bf16_tflops'"):
        chips_from_toml(path)


def test_measured_figures_replace_the_datasheet() -> None:
    chip = with_measured(find_chip("H100"), {"bf16_tflops": 700.0, "unrelated": 1.0})
    assert (chip.bf16_tflops, chip.basis) == (700.0, "measured on this machine")


def test_recovery_times_of_the_owners_drills_are_taken() -> None:
    ask = parse_train("2048 x H800, 1T tokens, save 5 s, detect 20 s, restart 120 s")
    assert ask.recovery is not None
    assert (ask.recovery.save_s, ask.recovery.down_s) == (5.0, 140.0)


@pytest.mark.parametrize(
    ("part", "said"),
    [("TP4 PP8 DP16", "that is DP64"), ("ZERO4", "ZERO0 to ZERO3"), ("recompute half", "recompute none, selective or full"),
     ("measured 410", "needs its unit"), ("410 tokens/s", "410 tokens/s in all"), ("0 failures", "above 0"), ("save 0 s", "above 0"), ("seq 0", "above 0"), ("batch 0", "above 0"), ("TP512", "1 to 128"),
     ("PP128", "1 to 61"), ("PP3 dualpipe", "not understood"), ("PP2 VPP2, zb", "VPP1"), ("dualpip", "Did you mean 'dualpipe'")],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_the_allowed_range(part: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        answer("deepseek-v3", train=[f"2048 x H800, 1T tokens, {part}"])


def test_a_comma_between_digits_groups_them_in_every_part() -> None:
    ask = parse_train("2,048 x H800, batch 15,360, 1T tokens, measured 1,250 tokens/s/chip")
    assert (ask.chips, ask.batch, ask.measured.value) == (2048, 15360, 1250.0)
    assert parse_serve("H20,512 in, 1,024 out").prompt == 512


def test_recomputation_and_data_parallelism_are_given_like_the_rest_of_a_layout() -> None:
    words = "64 x H100, 1T tokens, TP4 PP4 DP4 MB1, batch 256"
    ask = parse_train(words + ", recompute full")
    assert ask.layout.recompute == "full" and ask.layout.dp == 4
    found = [
        answer("llama-3.1-70b", train=[f"{words}, recompute {one}"]).trainings[0]
        for one in ("none", "selective", "full")
    ]
    assert found[2].step.seconds > found[0].step.seconds
    assert found[2].memory.total < found[0].memory.total
    searched = answer("llama-3.1-70b", train=["64 x H100, 1T tokens, recompute full"]).trainings[0]
    assert searched.job.layout.recompute == "full"


def test_software_that_no_published_run_tells_of_is_said_with_the_nearest_name() -> None:
    ask = parse_train("64 x B200, 1T tokens, software Megatron-Core no overlap")
    assert ask.software == "megatron-core, no overlap"
    typo = answer("llama-3.1-8b", train=["64 x H100, 1T tokens, software megatron-brige"])
    assert "Did you mean 'megatron-bridge'" in typo.trainings[0].notes[-1]
    service = answer("llama-3.1-8b", serve=["H100, software sglan"]).services[0]
    assert "Did you mean 'sglang'" in service.notes[-1]
    assert not answer("llama-3.1-8b", serve=["H100, software vLLM"]).services[0].notes


def test_an_own_chip_may_be_like_a_known_one_and_its_runs_speak_for_it(tmp_path: Path) -> None:
    path = tmp_path / "chips.toml"
    path.write_text('["ours"]\nlike = "h100"\nprice_usd_h = 0\nmemory_gb = 94\n')
    chip = chips_from_toml(path)["ours"]
    assert (chip.like, chip.memory_gb, chip.price_usd_h) == ("H100 SXM", 94, 0)
    assert chip.bf16_tflops == find_chip("H100").bf16_tflops
    ours, theirs = (
        answer("llama-3.1-8b", train=[f"64 x {name}, 1T tokens, TP2 MB1"], chip_file=path).trainings[0].step
        for name in ("ours", "H100")
    )  # fmt: skip
    assert ours.seconds == pytest.approx(theirs.seconds) and ours.high == pytest.approx(theirs.high)
    assert "no published training run" not in ours.basis
    path.write_text('["ours"]\nlike = "h1000"\n')
    with pytest.raises(RecipeError, match="Did you mean 'h100'"):
        chips_from_toml(path)


@pytest.mark.parametrize(
    ("line", "says"),
    [("price_usd_h = -1", "0 or more"), ("vendor = 5", "words in quotes"), ("memory_gb = true", "above 0")],
)  # fmt: skip
def test_a_chips_wrong_value_is_named(line: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "chips.toml"
    path.write_text(f'["ours"]\n{line}\n')
    with pytest.raises(RecipeError, match=says):
        chips_from_toml(path)


TABLE = "hidden = 4096\nlayers = 32\nheads = 32\nhead_dim = 128\nffn = 14336\nvocab = 32000\n"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("layers = 32", "layers = -3", "layers = -3 .* from 1 to"),
        ("layers = 32", 'layers = "x"', "layers = 'x'"),
        ("layers = 32", "layers = 3.5", "layers = 3.5"),
        ("layers = 32", "layers = 32\nexperts = 8", "topk = 0 .* from 1 to 8"),
        ("layers = 32", "layers = 32\ndense_layers = 40", "from 0 to 32"),
        ("ffn = 14336", "ffn = 0", "ffn = 0"),
        ("vocab = 32000\n", "vocab = 32000\n[latent]\nq_lora = 8\nkv_lora = -1\nnope = 8\nrope = 8\nv = 8", "kv_lora = -1"),
    ],
)  # fmt: skip
def test_a_models_impossible_size_is_named_with_the_allowed_range(
    old: str, new: str, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "m.toml"
    path.write_text(TABLE)
    assert model_named(str(path)).layers == 32
    path.write_text(TABLE.replace(old, new))
    with pytest.raises(RecipeError, match=says):
        model_named(str(path))


@pytest.mark.parametrize("text", ["[1, 2]", '"x"', '{"hidden_size": -4096, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 9}'])  # fmt: skip
def test_a_config_json_that_no_model_has_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(RecipeError, match="holds no object|hidden = -4096"):
        model_named(str(path))


def test_the_docs_count_models_and_chips_as_they_are() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")
    assert f"one of {len(named())} public names" in page
    assert f"**Chips**: {len(chips())} by name" in page


@pytest.mark.parametrize("said", ["15T tokens", "15 trillion tokens", "15e12 tokens", "1.5e+13 tokens", "15,000 billion tokens"])  # fmt: skip
def test_a_number_of_tokens_may_be_written_in_every_usual_way(said: str) -> None:
    ask = parse_train(f"2048 x H800, {said}, $2/h")
    assert (ask.tokens, ask.price_usd_h) == (15e12, 2.0)


def test_a_million_tokens_may_be_asked_for() -> None:
    assert parse_serve("H200, 1M in, 2k out").prompt == 1024**2


def test_a_models_table_that_lacks_sizes_says_which(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_text("hidden = 4096\nlayers = 32\nheads = 32\nffn = 9\nvocab = 9\n")
    with pytest.raises(
        RecipeError, match=r"m.toml: head_dim is missing; a table needs at least hidden"
    ):
        model_named(str(path))
