"""`compare-runs`: logs of others, read, refused or answered. The MLPerf figures are public results that no one here wrote."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from bascule.draws import generator, key
from bascule.errors import UsageError
from bascule.qualify.runs import Run, compare_groups, read_group, read_run

EXTRACT = Path(__file__).parents[1] / "data" / "mlperf_llama31_8b.json"
# Groups that declare the same settings and form one cluster each; which numeric precision they used is not declared.
CLUSTERS = (("dell-b200", "nvidia-theia8", "nvidia-tyche8"), ("nebius-b200", "oracle-b200"))


@pytest.fixture(scope="module")
def groups() -> dict[str, list[Run]]:
    stored = json.loads(EXTRACT.read_text(encoding="utf-8"))["groups"]
    return {
        name: [
            Run(
                f"{name}/{place}", *np.array(points, dtype=np.float64).T, settings=group["settings"]
            )
            for place, points in enumerate(group["runs"])
        ]
        for name, group in stored.items()
    }


def answer(a: list[Run], b: list[Run], **options: float) -> str:
    return str(compare_groups(a, b, **options).data()["answer"])


def test_public_groups_of_one_cluster_are_equal(groups: dict[str, list[Run]]) -> None:
    for cluster in CLUSTERS:
        for a, b in combinations(cluster, 2):
            assert answer(groups[a], groups[b]) == "equal", (a, b)


def test_public_groups_of_two_clusters_are_never_equal_and_mostly_different(
    groups: dict[str, list[Run]],
) -> None:
    found = Counter(answer(groups[a], groups[b]) for a in CLUSTERS[0] for b in CLUSTERS[1])
    assert found["equal"] == 0 and found["different"] >= 4


def test_public_groups_with_other_settings_are_refused(groups: dict[str, list[Run]]) -> None:
    learning_rate = compare_groups(groups["amd-mi350x"], groups["amd-mi355x"])
    batch = compare_groups(groups["amd-mi355x"], groups["nvidia-theia8"])
    assert learning_rate.refusal and "opt_base_learning_rate is 0.001" in learning_rate.refusal
    assert batch.refusal and "global_batch_size is 32" in batch.refusal
    assert learning_rate.data()["answer"] == "refused"


def test_a_noisy_public_pair_gets_the_third_answer_and_a_number(
    groups: dict[str, list[Run]],
) -> None:
    data = compare_groups(groups["amd-mi355x"], groups["gigacomputing"]).data()
    assert data["answer"] == "too few runs"
    assert data["runs_needed"] > 10 and 0 < data["power"] < 0.8
    assert data["ci90"][0] < data["difference"] < data["ci90"][1]


def test_groups_split_against_themselves_are_rarely_called_different(
    groups: dict[str, list[Run]],
) -> None:
    generator = np.random.default_rng(0)
    found: Counter[str] = Counter()
    for runs in groups.values():
        for _ in range(25):
            order = generator.permutation(len(runs))
            found[answer([runs[i] for i in order[:5]], [runs[i] for i in order[5:]])] += 1
    assert found["different"] <= 0.05 * found.total()


def test_one_jump_at_one_evaluation_does_not_decide(groups: dict[str, list[Run]]) -> None:
    a, b = groups["dell-b200"], groups["nvidia-theia8"]
    losses = a[0].losses.copy()
    losses[-3] *= 1.06
    jumped = [Run("jump", a[0].positions, losses, a[0].settings), *a[1:]]
    assert answer(jumped, b) == answer(a, b) == "equal"


def made(seed: int, count: int, *, gain: float = 1.0, start: float = 10.0) -> list[Run]:
    generator = np.random.default_rng(seed)
    steps = np.arange(1, 101, dtype=np.float64)
    runs = []
    for place in range(count):
        luck = np.exp(generator.normal(0.0, 0.001)) * np.exp(
            generator.normal(0.0, 0.002, len(steps))
        )
        losses = (
            (2.0 + (start - 2.0) * np.exp(-(steps - 1) / 20))
            * luck
            * np.where(steps > 1, gain, 1.0)
        )
        runs.append(Run(str(place), steps, losses))
    return runs


def test_a_difference_of_two_percent_is_found_and_none_is_equal() -> None:
    assert answer(made(1, 6), made(2, 6, gain=1.02)) == "different"
    assert answer(made(1, 6), made(2, 6)) == "equal"


def test_runs_that_start_from_another_loss_are_refused() -> None:
    found = compare_groups(made(1, 3), made(2, 3, start=10.6))
    assert found.refusal and "do not start from the same" in found.refusal


def test_runs_without_common_positions_are_refused() -> None:
    early, late = made(1, 2), made(2, 2)
    moved = [Run(run.source, run.positions + 1000, run.losses) for run in late]
    assert "no range of positions" in str(compare_groups(early, moved).refusal)


MLPERF = "\n".join(
    ":::MLLOG " + json.dumps({"event_type": "POINT_IN_TIME", "key": key, "value": value, "metadata": where})
    for key, value, where in [
        ("seed", 7, {}), ("global_batch_size", 16, {}), ("eval_accuracy", 5.2, {"samples_count": 100}),
        ("eval_accuracy", 4.1, {"samples_count": 200, "epoch_num": 2}),
    ]
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "settings"),
    [
        ("r.txt", "preamble\n" + MLPERF, {"global_batch_size": "16"}),
        ("r.jsonl", '{"config": {"lr": 1.0, "seed": 3}}\n{"step": 100, "loss": 5.2}\n{"step": 200, "loss": 4.1}\n{"st', {"lr": "1"}),
        ("r.csv", "step,lr,loss\n100,0.1,5.2\n200,0.1,4.1\n", {}),
        ("bare.txt", "# torchtitan\n100 5.2\n200 4.1\n", {}),
        ("ledger.jsonl", '{"kind":"recipe_resolved","recipe":{"seed":1,"sft":{"steps":9}}}\n{"kind":"step_stats","step":100,"loss":5.2}\n'
                         '{"kind":"alarm","step":100}\n{"kind":"step_stats","step":200,"loss":4.1}\n', {"sft": '{"steps": 9}'}),
    ],
)  # fmt: skip
def test_every_form_of_log_gives_the_same_series(
    name: str, text: str, settings: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    run = read_run(tmp_path / name)
    assert run.positions.tolist() == [100, 200] and run.losses.tolist() == [5.2, 4.1]
    assert run.settings == settings


def test_a_folder_stands_for_its_logs_and_a_run_folder_for_its_ledger(tmp_path: Path) -> None:
    for place in range(3):
        (tmp_path / f"result_{place}.txt").write_text(MLPERF)
    assert len(read_group([tmp_path])) == 3
    (tmp_path / "ledger.jsonl").write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n')
    assert len(read_group([tmp_path])) == 1


def test_a_run_folder_is_compared_up_to_grpo(tmp_path: Path) -> None:
    steps = [(1, "sft", 3.0), (2, "sft", 2.0), (3, "grpo", -0.001), (4, "grpo", 0.0)]
    lines = [
        json.dumps({"kind": "step_stats", "step": step, "phase": phase, "loss": loss})
        for step, phase, loss in steps
    ]
    (tmp_path / "ledger.jsonl").write_text("\n".join(lines))
    (run,) = read_group([tmp_path])
    assert run.losses.tolist() == [3.0, 2.0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "two"),
        ("step,loss\n1,2\n", "two"),
        ("step,loss\n1,2\n2,nan\n3,1\n", "diverged"),
        ("no numbers here", "two"),
    ],
)
def test_what_is_no_loss_series_is_refused_with_a_sentence(
    text: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(UsageError, match=said):
        read_run(tmp_path / "x.csv")


def test_a_missing_path_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        read_group([tmp_path / "nowhere"])
    with pytest.raises(UsageError, match="holds no"):
        read_group([tmp_path])


def mllog(path: Path, *, keep: Callable[[int], bool] = lambda at: True, lift: float = 0.0, seed: int = 0, **declared: object) -> Path:  # fmt: skip
    """A submission's log: one line an evaluation, some of them missing, keys of its own."""
    lines = [{"key": name, "value": value, "event_type": "POINT_IN_TIME"} for name, value in {"global_batch_size": 32, **declared}.items()]  # fmt: skip
    noise = generator(key(seed, "test.mllog")).standard_normal(20)
    for at in filter(keep, range(1, 21)):
        loss = float(4.0 * at**-0.1 * np.exp(lift + 0.001 * noise[at - 1]))
        lines.append({"key": "eval_accuracy", "value": loss, "event_type": "POINT_IN_TIME", "metadata": {"samples_count": 12288 * at}})  # fmt: skip
    text = "".join(f":::MLLOG {json.dumps(line)}\n" for line in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_logs_with_missing_evaluations_other_machines_and_gzip_are_still_compared(
    tmp_path: Path,
) -> None:
    a = [mllog(tmp_path / f"a/{i}.txt", seed=i, tensor_parallel_size=8) for i in range(6)]
    b = [mllog(tmp_path / f"b/{i}.log.gz", seed=10 + i, keep=lambda at: at % 5 > 0, tensor_parallel_size=1) for i in range(6)]  # fmt: skip
    assert answer(read_group([a[0].parent]), read_group([b[0].parent])) == "equal"
    far = [mllog(tmp_path / f"c/{i}.txt", seed=20 + i, lift=0.02) for i in range(6)]
    assert answer(read_group(a), read_group(far)) == "different"


def test_an_unknown_declared_setting_that_differs_is_refused(tmp_path: Path) -> None:
    a, b = (read_group([mllog(tmp_path / f"{what}.txt", dropout_rate=what)]) for what in (0.0, 0.1))
    assert compare_groups(a, b).data()["answer"] == "refused"


def test_one_run_a_side_is_too_few_and_the_answer_is_valid_json(tmp_path: Path) -> None:
    a, b = (read_group([mllog(tmp_path / f"{seed}.txt", seed=seed)]) for seed in (0, 1))
    found = compare_groups(a, b)
    data = json.loads(json.dumps(found.data(), allow_nan=False))
    assert (data["answer"], data["runs_needed"], data["ci90"]) == ("too few runs", None, [None, None])  # fmt: skip
    assert {"answer", "margin", "difference", "ci90", "power", "runs_needed"} <= data.keys()
    assert "a single run shows no spread" in found.sentence()


def test_a_damaged_gzip_file_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"1 2\n2 3\n")[:-9])
    with pytest.raises(UsageError, match="damaged gzip"):
        read_group([tmp_path])


def line(name: str, value: object, **where: object) -> str:
    return ":::MLLOG " + json.dumps({"namespace": "", "time_ms": 1, "event_type": "POINT_IN_TIME", "key": name, "value": value, "metadata": where})  # fmt: skip


def test_lines_of_ranks_prefixes_and_torn_lines_are_read_through(tmp_path: Path) -> None:
    text = "\r\n".join(
        [
            "0: " + line("global_batch_size", 16),
            "\x1b[32m" + line("eval_accuracy", 5.2, samples_count=100) + "\x1b[0m 3: other rank",
            line("eval_accuracy", 5.2, samples_count=100),
            line("eval_accuracy", "4.1", samples_count=200, epoch_num=2),
            line("eval_accuracy", None, samples_count=300),
            line("eval_accuracy", 3.9, samples_count=400)[:-9],
        ]
    )
    (tmp_path / "r.txt").write_bytes(text.encode())
    run = read_run(tmp_path / "r.txt")
    assert run.positions.tolist() == [100, 200] and run.losses.tolist() == [5.2, 4.1]


def test_steps_become_samples_where_the_batch_is_declared(tmp_path: Path) -> None:
    lines = [line("global_batch_size", 16), *(line("eval_accuracy", 5 - at, step_num=at) for at in (1, 2))]  # fmt: skip
    (tmp_path / "r.txt").write_text("\n".join(lines))
    assert read_run(tmp_path / "r.txt").positions.tolist() == [16, 32]


def test_of_two_metrics_one_is_taken_and_declared(tmp_path: Path) -> None:
    lines = [line("eval_accuracy", value, samples_count=at, metric=name) for at in (1, 2) for name, value in (("FID", 90.0), ("CLIP", 0.15))]  # fmt: skip
    (tmp_path / "r.txt").write_text("\n".join(lines))
    run = read_run(tmp_path / "r.txt")
    assert run.losses.tolist() == [0.15, 0.15] and run.settings["metric"] == "CLIP"


def test_two_runs_in_one_result_file_are_refused(tmp_path: Path) -> None:
    lines = [line("eval_accuracy", value, samples_count=at) for value in (4.0, 3.9) for at in (1, 2)]  # fmt: skip
    (tmp_path / "r.txt").write_text("\n".join(lines))
    with pytest.raises(UsageError, match="several runs in one file"):
        read_run(tmp_path / "r.txt")


def test_files_without_a_loss_are_left_out_of_a_folder_and_named(tmp_path: Path) -> None:
    mllog(tmp_path / "result_0")
    mllog(tmp_path / "result_1.txt", seed=1)
    (tmp_path / "README.txt").write_text("What these are.\n")
    (tmp_path / "system.log").write_text("driver 1.2\n")
    left_out: list[str] = []
    assert len(read_group([tmp_path], left_out)) == 2
    assert [Path(name).name for name in left_out] == ["README.txt", "system.log"]
    with pytest.raises(UsageError, match="holds 0 loss values"):
        read_group([tmp_path / "README.txt"])


def test_another_benchmark_is_refused_other_seeds_and_machines_are_not(tmp_path: Path) -> None:
    def group(name: str, **declared: object) -> list[Run]:
        for seed in range(4):
            mllog(tmp_path / name / f"{seed}.txt", seed=10 * ord(name) + seed, **{"submission_benchmark": "llama31_8b", **declared})  # fmt: skip
        return read_group([tmp_path / name])

    a = group("a", submission_org="X", opt_name="adamw", val_check_interval=4)
    b = group("b", submission_org="Y", opt_name="AdamW", val_check_interval=8)
    assert compare_groups(a, b).refusal is None
    other = compare_groups(a, group("c", submission_benchmark="llama2_70b_lora"))
    assert other.refusal and "submission_benchmark" in other.refusal


def test_a_run_that_was_cut_off_or_stands_twice_is_refused(tmp_path: Path) -> None:
    a = [mllog(tmp_path / f"a/{i}.txt", seed=i) for i in range(4)]
    b = [mllog(tmp_path / f"b/{i}.txt", seed=10 + i) for i in range(4)]
    cut = mllog(tmp_path / "cut.txt", seed=9, keep=lambda at: at < 5)
    copied = mllog(tmp_path / "copy.txt", seed=10)
    early = compare_groups(read_group([*a, cut]), read_group(b))
    assert early.refusal and "cut.txt" in early.refusal and "leave it out" in early.refusal
    twice = compare_groups(read_group(a), read_group([*b, copied]))
    assert twice.refusal and "the same run" in twice.refusal
