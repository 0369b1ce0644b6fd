"""Flight Recorder dumps: the guilty rank is named and no innocent one; recorded incidents with known truth, and made ones."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest

from bascule.errors import UsageError
from bascule.guard import blame

RECORDED = Path(__file__).parents[1] / "data" / "flight_recorder"
WORLD = 4


def entry(
    number: int,
    state: str = "scheduled",
    name: str = "x:all_reduce",
    group: str = "0",
    p2p: bool = False,
) -> dict[str, Any]:
    return {"pg_id": int(group), "process_group": [group, f"group {group}"], "collective_seq_id": number, "p2p_seq_id": 0, "profiling_name": name, "state": state, "is_p2p": p2p}  # fmt: skip


def dump(finished: int, entries: list[dict[str, Any]], issued: int | None = None) -> dict[str, Any]:
    return {
        "version": "2.9",
        "pg_config": {"0": {"name": "0", "desc": "group 0", "ranks": str(list(range(WORLD)))}},
        "pg_status": {
            "0": {
                "last_enqueued_collective": finished if issued is None else issued,
                "last_completed_collective": finished,
            }
        },
        "entries": entries,
    }


def waiting(finished: int = 9, issued: int = 12) -> dict[str, Any]:
    return dump(finished, [entry(number) for number in range(finished + 1, issued + 1)], issued)


def judged(tmp_path: Path, dumps: dict[int, dict[str, Any]]) -> blame.Blame:
    for number, value in dumps.items():
        (tmp_path / f"rank_{number}.json").write_text(json.dumps(value))
    return blame.blame(tmp_path)


@pytest.mark.parametrize(("incident", "guilty"), [("gpu_error", (12, 14)), ("lock_gil", (9, 14))])
def test_recorded_incidents_name_exactly_the_true_ranks(
    tmp_path: Path, incident: str, guilty: tuple[int, ...]
) -> None:
    dumps = json.loads((RECORDED / f"{incident}.json").read_text())
    found = judged(tmp_path, {int(number): value for number, value in dumps.items()})
    assert found.guilty_ranks == guilty and found.confidence == 0.9


@pytest.mark.parametrize("gone", [0, 5, 12])
def test_a_rank_without_a_dump_is_named_beside_the_others(tmp_path: Path, gone: int) -> None:
    dumps = {
        int(number): value
        for number, value in json.loads((RECORDED / "lock_gil.json").read_text()).items()
        if int(number) != gone
    }
    assert set(judged(tmp_path, dumps).guilty_ranks) == {9, 14, gone}


def test_a_process_that_stopped_never_arrives(tmp_path: Path) -> None:
    found = judged(tmp_path, {0: waiting(), 1: waiting(), 2: dump(9, []), 3: waiting()})
    assert found.guilty_ranks == (2,) and "never issued" in found.reason


def test_a_chip_that_stopped_does_not_finish_what_its_peers_finish(tmp_path: Path) -> None:
    found = judged(tmp_path, {0: waiting(), 1: waiting(finished=4), 2: waiting(), 3: waiting()})
    assert found.guilty_ranks == (1,) and "stopped inside" in found.reason


def test_one_collective_behind_may_be_the_moment_of_the_dump_and_is_only_a_lead(
    tmp_path: Path,
) -> None:
    found = judged(tmp_path, {0: waiting(), 1: waiting(finished=8), 2: waiting(), 3: waiting()})
    assert found.guilty_ranks == (1,) and found.confidence == 0.3


def test_a_victim_that_waits_in_another_group_is_not_named(tmp_path: Path) -> None:
    """Rank 1 never reached the collective that 0 and 2 wait in, because it waits for a message from rank 3, which is gone silent."""
    victim = dump(
        9,
        [
            entry(0, name="x:recv 1<-3", group="0", p2p=False)
            | {"is_p2p": True, "process_group": ["7", "pairs"], "pg_id": 7}
        ],
    )
    victim["pg_config"]["7"] = {"name": "7", "desc": "pairs", "ranks": "[0, 1, 2, 3]"}
    found = judged(tmp_path, {0: waiting(), 1: victim, 2: waiting(), 3: dump(9, [])})
    assert found.guilty_ranks == (3,)


def test_another_operation_under_the_same_number_is_a_mismatch(tmp_path: Path) -> None:
    odd = dump(9, [entry(10, name="x:broadcast")], 10)
    right = dump(9, [entry(10)], 10)
    found = judged(tmp_path, {0: right, 1: right, 2: odd, 3: right})
    assert found.guilty_ranks == (2,) and "another operation" in found.reason


def test_where_nothing_tells_the_ranks_apart_nobody_is_named(tmp_path: Path) -> None:
    found = judged(tmp_path, {number: waiting() for number in range(WORLD)})
    assert found.guilty_ranks == () and found.confidence == 0.0
    assert "guilty: nobody" in next(iter(blame.describe(found)))


def test_pickles_are_read_and_those_that_would_run_something_are_refused(tmp_path: Path) -> None:
    for number in range(WORLD):
        value = dump(9, []) if number == 3 else waiting()
        (tmp_path / f"trace_{number}").write_bytes(pickle.dumps(value))
    assert blame.blame(tmp_path).guilty_ranks == (3,)
    (tmp_path / "trace_2").write_bytes(pickle.dumps({"entries": random.Random(0)}))
    with pytest.raises(UsageError, match=r"asks for random\.Random"):
        blame.blame(tmp_path)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "it is empty"),
        (b"{broken", "it begins as JSON, which breaks off or goes wrong at line 1, column 2"),
        (b"\x80\x05N.", "it holds a NoneType, not a table"),
        (b"\x80\x05]q", "it begins as a pickle, and its 4 bytes are cut off or overwritten"),
        (b"not a dump", "it is neither a pickle nor JSON; it begins with b'not a dump'"),
        (b"[1]", "it is neither a pickle nor JSON"),
        (b"{}", "it holds none of the tables entries"),
        (b'{"entries": 5}', "a record in it is not as the recorder writes it"),
    ],
)
def test_damaged_dumps_are_refused_with_their_name_and_what_they_are(
    tmp_path: Path, content: bytes, found: str
) -> None:
    (tmp_path / "rank_0.json").write_bytes(content)
    with pytest.raises(UsageError) as refusal:
        blame.blame(tmp_path)
    assert "rank_0.json' is not a Flight Recorder dump" in str(refusal.value)
    assert found in str(refusal.value) and "Remove this one or dump" in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b'{"version": "2.9", "pg_con'])
def test_a_rank_that_died_while_it_wrote_its_dump_gave_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "rank_2.json").write_bytes(content)
    found = judged(tmp_path, {0: waiting(), 1: waiting(), 3: waiting()})
    assert found.guilty_ranks == (2,) and found.confidence == 0.6
    assert "taken as no dump" in found.evidence[-1] and "rank_2.json" in found.evidence[-1]


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no dumps"):
        blame.blame(tmp_path)


def gloo(last: int, *, size: int = 64) -> dict:  # type: ignore[type-arg]
    """As gloo's recorder writes it: the group of all ranks has no name, and nothing is ever marked completed."""
    entries = [
        entry(number, name="gloo:all_reduce", state="scheduled") | {"input_sizes": [[size]]}
        for number in range(1, last + 1)
    ]
    return {
        "pg_config": {"": {"name": "", "desc": "", "ranks": "[0, 1, 2, 3]"}},
        "pg_status": {"0": {"last_enqueued_collective": last, "last_completed_collective": 3}},
        "entries": entries,
    }


def test_gloos_dumps_are_read_and_its_dead_rank_is_missed(tmp_path: Path) -> None:
    found = judged(tmp_path, {0: gloo(4), 1: gloo(4), 3: gloo(4)})
    assert found.guilty_ranks == (2,) and "gave no dump" in found.reason


def test_a_sum_of_another_size_is_another_operation(tmp_path: Path) -> None:
    found = judged(tmp_path, {0: gloo(4), 1: gloo(4, size=48), 2: gloo(4), 3: gloo(4)})
    assert found.guilty_ranks == (1,)
    assert "all_reduce of 48 numbers" in found.evidence[0]


def test_a_peer_that_a_mismatch_killed_is_not_named_beside_who_mismatched(tmp_path: Path) -> None:
    found = judged(tmp_path, {0: gloo(4, size=48), 2: gloo(4), 3: gloo(4)})
    assert found.guilty_ranks == (0,)


def test_a_rank_that_died_first_is_named_and_not_those_that_fell_in_its_wake(
    tmp_path: Path,
) -> None:
    for number in (0, 1):  # 3 died, and 2 was gone before it could dump
        (tmp_path / f"rank_{number}.json").write_text(json.dumps(gloo(4)))
    assert blame.blame(tmp_path).guilty_ranks == (2, 3)
    assert blame.blame(tmp_path, died_first=3).guilty_ranks == (3,)


def test_ranks_without_a_status_table_are_not_taken_for_stopped(tmp_path: Path) -> None:
    """Old dumps have none: a rank whose first entry is number 10 had finished 9."""
    dumps = {number: waiting() for number in range(WORLD)}
    dumps[2] = dump(9, [entry(10)], 10)
    del dumps[2]["pg_status"]
    assert judged(tmp_path, dumps).guilty_ranks == ()


def test_a_root_that_ran_ahead_with_broadcasts_accuses_nobody(tmp_path: Path) -> None:
    ahead = [entry(number, name="x:broadcast") for number in range(10, 15)]
    root = dump(14, [entry(15)], 15)
    held = dump(9, [*ahead, entry(15)], 15)
    assert judged(tmp_path, {0: root, 1: held, 2: held, 3: held}).guilty_ranks == ()


def test_two_groups_of_one_purpose_and_the_same_ranks_are_not_mixed(tmp_path: Path) -> None:
    """Device meshes call them all `undefined`."""

    def twice(second: int) -> dict[str, Any]:
        made = dump(100, [], 100)
        everyone = str(list(range(WORLD)))
        made["pg_config"] = {
            name: {"name": name, "desc": "undefined", "ranks": everyone} for name in ("0", "1")
        }
        made["pg_status"]["1"] = {"last_enqueued_collective": second, "last_completed_collective": 5}  # fmt: skip
        return made

    found = judged(tmp_path, {0: twice(6), 1: twice(6), 2: twice(5), 3: twice(6)})
    assert found.guilty_ranks == (2,) and "(2)" in found.evidence[0]


def test_another_type_of_number_is_another_operation(tmp_path: Path) -> None:
    def reducing(kind: str) -> dict[str, Any]:
        return dump(9, [entry(10) | {"input_sizes": [[8, 8]], "input_dtypes": [kind]}], 10)

    dumps = {number: reducing("Float" if number == 1 else "BFloat16") for number in range(WORLD)}
    found = judged(tmp_path, dumps)
    assert found.guilty_ranks == (1,) and "64 Float" in found.evidence[0]


def test_batches_of_collectives_under_one_number_are_not_compared(tmp_path: Path) -> None:
    """The ring of rank 3 has forgotten the first of three coalesced gathers."""
    batch = [
        entry(10, name="x:_all_gather_base") | {"input_sizes": [[size]]} for size in (4, 8, 16)
    ]
    dumps = {number: dump(9, batch, 10) for number in range(3)}
    dumps[3] = dump(9, batch[1:], 10)
    assert judged(tmp_path, dumps).guilty_ranks == ()


def test_messages_in_the_group_of_all_ranks_leave_its_collectives_comparable(
    tmp_path: Path,
) -> None:
    """Its status counts messages too; the entries of its collectives do not."""
    message = entry(3, name="x:recv 1<-0", p2p=True) | {"state": "completed"}
    dumps = {number: waiting() for number in range(WORLD)}
    for number in (0, 1):
        dumps[number]["entries"].insert(0, message)
        dumps[number]["pg_status"]["0"]["last_enqueued_collective"] = 400
        dumps[number]["pg_status"]["0"]["last_completed_collective"] = 390
    assert judged(tmp_path, dumps).guilty_ranks == ()
    dumps[3] = dump(9, [])
    assert judged(tmp_path, dumps).guilty_ranks == (3,)


def test_a_folder_with_a_few_of_many_dumps_names_none_of_the_rest(tmp_path: Path) -> None:
    found = judged(tmp_path, {0: waiting()})
    assert found.guilty_ranks == ()


def test_one_that_left_a_collective_out_and_went_on_is_named(tmp_path: Path) -> None:
    def standing(number: int, group: str) -> dict[str, Any]:
        made = dump(9, [entry(number, name="x:all_to_all", group=group)], 9)
        everyone = str(list(range(WORLD)))
        made["pg_config"]["1"] = {"name": "1", "desc": "group 1", "ranks": everyone}
        return made

    dumps = {number: standing(10, "0") for number in range(WORLD)}
    dumps[2] = standing(5, "1")
    found = judged(tmp_path, dumps)
    assert found.guilty_ranks == (2,) and "left out" in found.reason
