"""Serving: what prompts, chips apart and an index cost a decoding step."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest

from bascule.errors import RecipeError
from bascule.plan.ask import parse_serve
from bascule.plan.catalogue import find_chip
from bascule.plan.fit import DATA
from bascule.plan.models import model_named
from bascule.plan.runs_table import read_rows
from bascule.plan.service_price import operating_point, price_service
from bascule.plan.serving import (
    MEMORY_USABLE,
    SOFTWARE_TODAY,
    ServeConstants,
    Serving,
    as_run,
    chosen_batch,
    decoding_share,
    memory_batch,
    rate,
    step_s,
    token_s,
)
from bascule.plan.serving_table import serving_of, software_date

C = ServeConstants()
LONG = Serving(
    shape=model_named("deepseek-v3"), chip=find_chip("GB200"), chips=16, precision="fp4", phase="both",
    prompt=65536, completion=4096, tpot_s=0.05,
)  # fmt: skip


def test_prompts_on_chips_of_their_own_do_not_slow_a_token() -> None:
    apart = replace(LONG, apart=True)
    assert token_s(LONG, C, 4.0) > 1.5 * token_s(apart, C, 4.0)
    assert rate(apart, C) > rate(LONG, C)  # the limit leaves room for more sequences


def test_the_share_of_decoding_chips_keeps_both_sides_busy() -> None:
    apart = replace(LONG, apart=True, batch=4.0)
    share = decoding_share(apart, C)
    assert 0 < share < 1
    decoded = share * rate(apart, C) / share  # tokens a second and chip of the whole
    prompts = decoded * apart.prompt / apart.completion
    prefill = rate(replace(apart, phase="prefill"), C) * (1 - share)
    assert prompts == pytest.approx(prefill, rel=0.02)


def test_an_index_reads_and_multiplies_the_whole_context() -> None:
    sparse = replace(LONG, shape=model_named("deepseek-v3.2"))
    without = replace(sparse, shape=replace(sparse.shape, index_width=0))
    parts, fewer = step_s(sparse, C, 4.0), step_s(without, C, 4.0)
    assert parts["attention"] > 2 * fewer["attention"]
    assert parts["cache"] > fewer["cache"]


def test_a_windows_layers_cache_no_more_than_the_window() -> None:
    served = price_service(
        model_named("gemma-3-27b"), parse_serve("H20, 4k in, 1k out, 50 ms"), pue=1.3
    )
    assert served.cache_gb < 96


@pytest.mark.parametrize("chip", ["Ascend 910B", "H20"])
def test_a_replica_without_room_for_a_cache_is_refused_with_one_that_has(chip: str) -> None:
    shape = model_named("deepseek-v3")
    with pytest.raises(RecipeError, match=r"leave no room .* take (\d+) chips or more") as refused:
        price_service(shape, parse_serve(f"4 x {chip}, 4k in, 1k out, 50 ms"), pue=1.3)
    found = re.search(r"take (\d+) chips", str(refused.value))
    assert found
    asked = parse_serve(f"{found[1]} x {chip}, 4k in, 1k out, 200 ms")
    assert price_service(shape, asked, pue=1.3).cache_gb > 0


def test_a_replica_of_more_chips_than_serve_together_is_refused_with_the_range() -> None:
    with pytest.raises(RecipeError, match="1 to 4,096 chips that serve together"):
        price_service(model_named("llama-3.1-8b"), parse_serve("100000 x H100, 50 ms"), pue=1.3)


def test_a_limit_that_one_sequence_cannot_keep_is_said_with_its_floor() -> None:
    shape = model_named("deepseek-v3")
    floor = price_service(shape, parse_serve("H20, 4k in, 1k out, 0.001 ms"), pue=1.3)
    assert floor.batch_per_chip == pytest.approx(1 / floor.chips)
    a_little_below = parse_serve("H20, 4k in, 1k out, 18 ms")  # the physics alone keeps it: 17.4
    for service in (floor, price_service(shape, a_little_below, pue=1.3)):
        assert f"its floor is {service.tpot_s[0] * 1e3:.1f} ms" in service.notes[0]
    kept = price_service(shape, parse_serve("H20, 4k in, 1k out, 50 ms"), pue=1.3)
    assert not kept.notes and kept.tpot_s[0] <= 0.05


def test_the_parts_of_a_decoding_step_add_up_to_its_time() -> None:
    found = price_service(model_named("deepseek-v3"), parse_serve("H20, 50 ms"), pue=1.3)
    assert sum(found.parts.values()) == pytest.approx(found.tpot_s[0])


def test_the_batch_at_a_limit_keeps_it_to_a_hair() -> None:
    for milliseconds in (30, 60, 120, 400):
        p = replace(LONG, tpot_s=milliseconds / 1e3)
        batch = chosen_batch(p, C)
        limit = max(p.tpot_s or 0.0, 1.5 * token_s(p, C, 1.0))
        full = batch == pytest.approx(memory_batch(p))
        assert full or token_s(p, C, batch) == pytest.approx(limit, rel=1e-5)


def test_a_concurrency_that_tensor_parallelism_cannot_hold_is_served_with_attention_apart() -> None:
    rows = {row["id"]: row for row in read_rows(DATA / "inference.csv")}
    many = rows["ix-r1-b200-b200-vs-mi300x-3"]  # 557 sequences of 9,216 tokens
    assert serving_of(many).split
    assert not serving_of({**many, "batch_or_concurrency": "16"}).split
    assert not serving_of({**many, "deployment": "agg TP8", "chips": "8"}).split


@pytest.mark.parametrize(
    ("row", "year"),
    [({"phase": "MLPerf v5.1 offline"}, 2025.7), ({"source": "arXiv:2506.12708 Table 2"}, 2025.5),
     ({"source": "lmsys.org 2025-05-05-large-scale-ep"}, 2025.4), ({"notes": "captured mid-2026"}, 2026.5), ({}, SOFTWARE_TODAY)],
)  # fmt: skip
def test_the_software_is_dated_by_the_rows_words(row: dict[str, str], year: float) -> None:
    blank = dict.fromkeys(("framework", "phase", "source", "notes"), "")
    assert software_date({**blank, **row}) == pytest.approx(year, abs=0.05)


def test_a_replica_that_nobody_sized_has_room_for_a_cache() -> None:
    shape = model_named("deepseek-v3")
    for chip in ("A100-40", "TPU v5e"):  # dense parts on every chip fill small memories
        found = price_service(shape, parse_serve(f"{chip}, 4k in, 1k out, 50 ms"), pue=1.3)
        assert found.cache_gb > 0 and found.batch_per_chip > 0.1


def test_a_paged_cache_is_filled_by_what_sequences_hold_on_average() -> None:
    """Not by what each may come to; where completions differ much the long ones rule (`varied`)."""
    plain = Serving(
        shape=model_named("llama-3.1-70b"), chip=find_chip("H200"), chips=1, precision="fp8", phase="both", prompt=1000,
        completion=1000,
    )  # fmt: skip
    held = plain.shape.parameters * 1.0 + memory_batch(plain) * 1500 * plain.cache_bytes
    assert held == pytest.approx(MEMORY_USABLE * 141e9, rel=0.01)
    assert memory_batch(replace(plain, varied=True)) == pytest.approx(memory_batch(plain) * 0.75)


def test_a_request_costs_its_chips_a_time_of_their_own() -> None:
    """So short prompts cost more a token; tensor parallelism makes all chips wait for each."""
    spread, cut = (
        replace(LONG, phase="prefill", prompt=100, split=split) for split in (True, False)
    )
    free = replace(C, request=-40.0)
    costs = [1 / rate(one, C) - 1 / rate(one, free) for one in (spread, cut)]
    assert costs[0] == pytest.approx(math.exp(C.request) / 100, rel=1e-6)
    assert costs[1] == pytest.approx(LONG.chips * costs[0], rel=1e-6)


def test_weights_released_at_4_bits_stay_so_and_are_unpacked_where_no_kernel_takes_them() -> None:
    """A table's 'FP8' of gpt-oss means its products. Read as 8-bit weights on Hopper its points were missed by 60 to 90 %."""
    shape, llama = model_named("gpt-oss-120b"), model_named("llama-3.1-70b")
    hopper, blackwell = find_chip("H100"), find_chip("B200")
    for said in ("fp8", "fp4"):
        assert as_run(shape, hopper, said) == ("bf16", 0.5625)
        assert as_run(shape, blackwell, said) == ("fp8", 0.5625)
    assert as_run(shape, hopper, "bf16") == ("bf16", 2.0)
    assert as_run(llama, hopper, "fp8") == ("fp8", 1.0)
    row = next(r for r in read_rows(DATA / "inference.csv") if r["id"] == "trt11-gpt-oss-120b-h100-1024-1024")  # fmt: skip
    read = serving_of(row)
    assert row["precision"] == "FP8" and (read.precision, read.element_bytes) == ("bf16", 0.5625)
    asked = operating_point(shape, parse_serve("H100, 4k in, 1k out, 50 ms"))
    assert (asked.precision, asked.element_bytes) == ("bf16", 0.5625)
    said = price_service(shape, parse_serve("H100, 4k in, 1k out, 50 ms"), pue=1.3).notes
    assert said == (
        "gpt-oss-120b is released with 4-bit weights alone; on H100 SXM they run as bf16, not as fp8 weights",
    )
    assert price_service(llama, parse_serve("H100, 4k in, 1k out, 50 ms"), pue=1.3).notes == ()
