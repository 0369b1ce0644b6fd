"""The catalogue is complete, its profiles are honest, and docs/faults.md says the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from bascule.config.load import package_toml
from bascule.errors import RecipeError
from bascule.faults import handbook
from bascule.faults.build import CLASSES
from bascule.faults.catalogue import (
    DEFECTS_FILE,
    KINDS,
    SEVERITIES,
    FaultSpec,
    load_profile,
    open_profile,
    profiles,
)
from bascule.faults.storage import _DAMAGE

DOCS = Path(__file__).parents[2] / "docs" / "faults.md"


def test_every_kind_has_code_that_plays_it_and_all_code_has_a_kind() -> None:
    assert {kind.name for kind in KINDS} == set(CLASSES) | set(_DAMAGE)
    assert len({kind.name for kind in KINDS}) == len(KINDS)


def test_every_profile_loads_and_has_a_title_and_only_clean_has_no_fault() -> None:
    loaded = [load_profile(name) for name in profiles()]
    assert all(len(profile.title) > 10 for profile in loaded)
    assert [profile.name for profile in loaded if not profile.faults] == ["clean"]


def test_the_families_of_the_first_part_each_have_a_profile() -> None:
    played = {fault.kind for name in profiles() for fault in load_profile(name).faults}
    assert {
        "zeroed",
        "bit_flip",
        "sign",
        "mixed",
        "nan",
        "missing_operator",
        "hang",
        "process_death",
    } <= played
    assert {"out_of_memory", "slow", "gain", "truncate"} <= played


def test_the_r2_profile_says_that_it_is_our_construction_and_plants_no_nan() -> None:
    profile = load_profile("ascend-r2")
    assert "our own construction" in profile.title and "invented by us" in profile.story
    (fault,) = profile.faults
    assert fault.kind == "mixed" and fault.size == 0.0
    assert fault.roles == ("train",) and fault.onset_step == 307 and not fault.transient


def test_the_docs_are_current() -> None:
    assert DOCS.read_text(encoding="utf-8") == handbook.markdown(), (
        "run: python -m bascule.faults.handbook > docs/faults.md"
    )


def test_the_catalogue_needs_no_torch() -> None:
    code = "import sys, bascule.faults.catalogue as c; c.load_profile('ascend-r2'); print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.stdout.strip() == "False", ran.stderr


def test_an_unknown_kind_or_impossible_bits_are_refused() -> None:
    with pytest.raises(ValidationError, match="Did you mean 'zeroed'"):
        FaultSpec(kind="zeroes")
    with pytest.raises(ValidationError, match="lowest first"):
        FaultSpec(kind="bit_flip", bits=(25, 16))


def test_overriding_a_knob_changes_every_fault_and_an_unknown_one_is_refused() -> None:
    profile = load_profile("ascend-r2").overridden({"onset_step": 7, "roles": ["infer"]})
    assert profile.faults[0].onset_step == 7 and profile.faults[0].roles == ("infer",)
    with pytest.raises(RecipeError, match="Did you mean 'stride'"):
        profile.overridden({"strid": 3})


def test_every_reported_defect_of_chips_memory_links_and_kernels_is_played_or_has_its_reason() -> (
    None
):
    defects = package_toml(DEFECTS_FILE)
    played = {row for name in profiles() for row in load_profile(name).plays}
    assert len(defects) == 68 and played <= set(defects)
    assert [row for row in defects if (row in played) == ("not_played" in defects[row])] == []


def test_what_plays_a_row_of_a_to_d_has_three_severities_that_all_load() -> None:
    for name in profiles():
        profile = load_profile(name)
        if any(row[0] in "ABCD" for row in profile.plays):
            found = [open_profile(f"{name}:{severity}").faults for severity in SEVERITIES]
            assert found[0] != found[1] != found[2] and found[1] == profile.faults, name
            assert set(profile.fit_for) == {"train", "infer"} or profile.cluster, name


def test_a_severity_is_named_after_a_colon_or_as_a_knob_and_knobs_go_over_it() -> None:
    (high,) = open_profile("zeroed:high").faults
    assert (high.rate, high.stride) == (1.0, 7)
    assert open_profile("zeroed?severity=high").faults == (high,)
    (both,) = open_profile("zeroed:high?stride=9").faults
    assert (both.rate, both.stride) == (1.0, 9)
    with pytest.raises(RecipeError, match="Did you mean 'high'"):
        open_profile("zeroed:hihg")
    with pytest.raises(RecipeError, match="one severity only"):
        open_profile("slowing:high")
