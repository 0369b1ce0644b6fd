"""Hung jobs on paper (hung_job.py): tensor, pipeline, data and stage groups, messages, broadcasts, hosts that run ahead, dumps with and
without status, timing and history. No innocent rank may ever be named; where the dumps hold the proof the guilty one must be."""

from __future__ import annotations

import json
import pickle
import random
import sys
from pathlib import Path

import pytest

from bascule.errors import UsageError
from bascule.guard import blame, recorder

sys.path.insert(0, str(Path(__file__).parent))
import hung_job

SHAPES = ((2, 2, 2), (2, 4, 2), (4, 2, 2), (2, 1, 2), (4, 1, 1), (1, 4, 2), (2, 2, 4))
SEEDS = 8
LEAST = {"host": 0.7, "chip": 0.85, "dead": 0.95, "other": 0.95}
"""Share of the guilty that must be named. Of a chip that sleeps or dies inside a collective dumps without timing say nothing, and a rank
whose process stops while it waits for a message looks like any other that does."""


def hung(seed: int, kind: str) -> tuple[hung_job.Job, set[int], random.Random]:
    rng = random.Random(f"{seed} {kind}")
    job = hung_job.Job(rng, rng.choice(SHAPES), timing=rng.random() < 0.3)
    both = job.world > 4 and kind in ("host", "chip", "sleep", "dead") and rng.random() < 0.3
    guilty = rng.sample(range(job.world), 1 + both)
    job.run(kind, guilty)
    if kind == "inside":
        job.break_inside(guilty[0])
    return job, set(guilty), rng


@pytest.mark.parametrize("kind", hung_job.KINDS)
def test_guilty_ranks_are_named_and_no_innocent_one(kind: str) -> None:
    named = wanted = 0
    for seed in range(SEEDS):
        job, guilty, rng = hung(seed, kind)
        dumps = job.dumps(status=rng.random() < 0.7, whole=rng.random() < 0.4)
        found = blame.judge({rank: recorder.rank_of(rank, dump) for rank, dump in dumps.items()})
        assert set(found.guilty_ranks) <= guilty, (seed, kind, guilty, found)
        named += len(found.guilty_ranks)
        wanted += len(guilty)
    assert named >= LEAST.get(kind, 0.0) * wanted


def test_a_job_that_ends_has_nobody_to_blame() -> None:
    job = hung_job.Job(random.Random(1), (2, 2, 2), timing=False)
    job.run("host", [])
    assert all(op.done for program in job.programs for op in program)
    dumps = job.dumps(status=True, whole=True)
    ranks = {rank: recorder.rank_of(rank, dump) for rank, dump in dumps.items()}
    assert blame.judge(ranks) == blame.Blame((), "no rank differs from its peers in these dumps", 0.0)  # fmt: skip


def test_a_sleeping_chip_is_named_where_the_recorder_keeps_time() -> None:
    job = hung_job.Job(random.Random(3), (4, 1, 1), timing=True)
    job.run("sleep", [2])
    dumps = job.dumps(status=True, whole=False)
    ranks = {rank: recorder.rank_of(rank, dump) for rank, dump in dumps.items()}
    found = blame.judge(ranks)
    assert found.guilty_ranks == (2,) and "never began" in found.reason


def test_json_and_pickle_and_a_ring_that_forgot_say_the_same(tmp_path: Path) -> None:
    job, guilty, _ = hung(1, "dead")
    answers = []
    for form in ("json", "pickle", "short"):
        folder = tmp_path / form
        folder.mkdir()
        for rank, dump in job.dumps(status=True, whole=True).items():
            kept = dump | {"entries": dump["entries"][-30:]} if form == "short" else dump
            data = pickle.dumps(kept) if form == "pickle" else json.dumps(kept).encode()
            (folder / f"nccl_trace_rank_{rank}").write_bytes(data)
        answers.append(blame.blame(folder).guilty_ranks)
    assert answers == [tuple(sorted(guilty))] * 3


@pytest.mark.parametrize("form", ["json", "pickle"])
def test_a_damaged_dump_is_refused_or_read_and_never_crashes(tmp_path: Path, form: str) -> None:
    job, _, _ = hung(2, "host")
    dump = job.dumps(status=True, whole=False)[1]
    sound = pickle.dumps(dump) if form == "pickle" else json.dumps(dump).encode()
    rng = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(sound)
        for _ in range(rng.randrange(1, 6)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        if rng.random() < 0.3:
            del damaged[rng.randrange(len(damaged)) :]
        (tmp_path / "rank_1").write_bytes(bytes(damaged))
        try:
            blame.blame(tmp_path)
        except UsageError as error:
            assert "rank_1' is not a Flight Recorder dump" in str(error)
            refused += 1
    assert refused > 30
