"""Serving: what prompts, chips apart and an index cost a decoding step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bascule.plan.ask import parse_serve
from bascule.plan.catalogue import find_chip
from bascule.plan.models import model_named
from bascule.plan.service_price import price_service
from bascule.plan.serving import ServeConstants, Serving, decoding_share, rate, step_s, token_s

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
