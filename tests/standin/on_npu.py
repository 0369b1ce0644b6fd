"""What must hold on a foreign device. Run by test_standin.py under the stand-in; `pytest tests/standin/on_npu.py` runs it on a real one."""

from __future__ import annotations

import copy
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.utils._python_dispatch import TorchDispatchMode

from bascule.accelerators.base import Accelerator, Work
from bascule.accelerators.registry import open_accelerator
from bascule.config.model import ModelConfig
from bascule.config.training import Precision
from bascule.errors import AcceleratorUnavailable
from bascule.infer import linear
from bascule.infer.batch import Batch
from bascule.infer.engine import Engine
from bascule.infer.row import Row
from bascule.infer.sampling import Sampling
from bascule.model import weights
from bascule.model.transformer import Transformer
from bascule.train import precision
from bascule.train.optimizer import SplitOptimizer
from bascule.train.recorded import RECORD_AFTER, TRIALS, RecordedSteps
from bascule.train.step import Stepper
from tests.recordings import Graph, Recordings
from tests.train import steps
from tests.waits import Waits

STANDIN = getattr(torch.get_device_module("npu"), "extension", None)


def model() -> Transformer:
    made = Transformer(ModelConfig(preset="tick"))
    weights.initialise(made, 0)
    return made


def learn(
    chip: Accelerator, made: torch.nn.Module, steps: int = 1
) -> tuple[list[float], dict[str, torch.Tensor]]:
    made = chip.move(copy.deepcopy(made))
    tokens = chip.to_device(torch.arange(8 * 32).view(8, 32) % 100)
    optimizer, losses = torch.optim.AdamW(made.parameters(), lr=3e-3), []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        with chip.session(Work("train", step)):
            logits = made(tokens).logits_BTV
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
            )
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    return losses, {name: parameter.grad.cpu() for name, parameter in made.named_parameters()}


@pytest.mark.parametrize("how", ["foreach", "fused"])
def test_npu_adamw_in_every_form_ends_with_the_cpus_bits(how: str) -> None:
    ended = []
    for device in ("cpu", "npu"):
        weight = torch.cos(torch.arange(64.0)).to(device).requires_grad_()
        optimizer = torch.optim.AdamW([weight], lr=1e-2, **{how: True})
        for _ in range(3):
            optimizer.zero_grad()
            weight.pow(3).sum().backward()
            optimizer.step()
        ended.append(weight.detach().cpu())
    assert torch.equal(*ended)


def test_npu_our_optimizer_takes_the_fused_kernel_and_ends_with_the_cpus_bits() -> None:
    ended = []
    for device, fused in (("cpu", True), ("npu", None)):
        weight = {"bias": torch.cos(torch.arange(64.0)).to(device)}
        optimizer = SplitOptimizer(weight, learning_rate=1e-2, fused=fused)
        assert optimizer._bundles == [(["bias"], False)]
        for _ in range(3):
            optimizer.step({"bias": weight["bias"].square()}, factor=1.0, grad_scale=0.5)
        ended.append(weight["bias"].cpu())
    assert torch.equal(*ended)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_npu_autocast_runs_products_in_the_half_type_and_sums_in_fp32(dtype: torch.dtype) -> None:
    weight = torch.ones(64, 64, device="npu", requires_grad=True)
    with torch.autocast("npu", dtype=dtype):
        product = weight @ weight
        loss = torch.nn.functional.cross_entropy(product, torch.arange(64, device="npu"))
    loss.backward()
    assert product.dtype == dtype and loss.dtype == weight.grad.dtype == torch.float32


def test_npu_state_goes_through_a_distributed_checkpoint_of_one(tmp_path: Path) -> None:
    saved = open_accelerator("npu").move(model()).state_dict()
    dcp.save(saved, checkpoint_id=tmp_path)
    back = {name: torch.zeros_like(value) for name, value in saved.items()}
    dcp.load(back, checkpoint_id=tmp_path)
    assert all(torch.equal(value.cpu(), back[name].cpu()) for name, value in saved.items())


class Threads(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(threading.get_ident())
        return func(*args, **(kwargs or {}))


def test_npu_trains_the_model_as_the_cpu_does() -> None:
    start = model()
    here, there = learn(open_accelerator("cpu"), start, 4), learn(open_accelerator("npu"), start, 4)
    assert here[1].keys() == there[1].keys()
    assert all(abs(a - b) < 1e-5 for a, b in zip(here[0], there[0], strict=True))
    for name, gradient in here[1].items():
        assert (gradient - there[1][name]).norm() <= 1e-3 * gradient.norm() + 1e-9, name


def test_npu_backward_runs_in_a_device_thread_and_the_modes_follow_it(tmp_path: Path) -> None:
    weight = torch.randn(64, 64, device="npu", requires_grad=True)
    chip = open_accelerator("sim:backward-wrong@npu", fault_log=tmp_path / "log")
    with chip.session(Work("train", 1)), Threads() as threads:
        (weight @ weight).sum().backward()
    assert len(threads.seen) == 2
    assert {
        json.loads(line)["direction"] for line in (tmp_path / "log").read_text().splitlines()
    } == {"backward"}


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(8, 4)
        self.head = torch.nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight


def test_npu_module_to_unties_tied_weights_which_is_why_move_ties_them_again() -> None:
    assert len(list(Tied().to("npu").parameters())) == 2
    assert len(list(open_accelerator("npu").move(Tied()).parameters())) == 1


def test_npu_allocations_are_counted_and_freed() -> None:
    chip = open_accelerator("npu")
    before = chip.memory().allocated_bytes
    kept = torch.ones(1 << 20, device="npu")
    assert chip.memory().allocated_bytes == before + kept.nbytes
    del kept
    assert chip.memory().allocated_bytes == before
    chip.reset_peak_memory()
    assert chip.memory().peak_bytes == before


@pytest.mark.skipif(STANDIN is None, reason="only the stand-in's memory can be made short")
def test_npu_out_of_memory_is_torchs_own_error_and_passes_when_memory_is_back() -> None:
    total = STANDIN.total(0)
    STANDIN.set_limit(0, STANDIN.used(0) + 1000)
    try:
        with pytest.raises(torch.OutOfMemoryError, match="NPU out of memory"):
            torch.ones(100_000, device="npu")
    finally:
        STANDIN.set_limit(0, total)
    assert torch.ones(100_000, device="npu").sum().item() == 100_000


def test_npu_number_that_is_not_there_is_refused_in_words() -> None:
    with pytest.raises(AcceleratorUnavailable, match="npu devices? here, counted from 0"):
        open_accelerator("npu:9")


def test_npu_weights_come_back_from_a_file_on_another_device(tmp_path: Path) -> None:
    made = open_accelerator("npu").move(model())
    torch.save(made.state_dict(), tmp_path / "weights.pt")
    back = torch.load(tmp_path / "weights.pt", map_location="cpu", weights_only=True)
    assert all(torch.equal(tensor.cpu(), back[name]) for name, tensor in made.state_dict().items())
    assert weights.fingerprint_state(back) == weights.fingerprint(made)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("phase", ["sft", "pretrain", "grpo"])
@pytest.mark.parametrize("products", ["fp32", "bf16"])
def test_npu_a_step_waits_once_for_its_figures_and_where_tokens_are_many_for_each_expert_layer(
    phase: str, products: Precision, many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if many:
        monkeypatch.setattr("bascule.model.experts.PADDED_TOKENS", 0)
    stepper = steps.stepper(open_accelerator("npu"))
    stepper.precision = products
    objective = steps.objectives(stepper)[phase]
    stepper.begin(objective)
    for step in (1, 2):
        batch = objective.next_batch(step)
        with Waits("npu") as waits:
            stepper.commit(stepper.propose(batch))
        layers = len(stepper.model.moe_layers()) if many else 0
        assert waits.seen == {"copy to the host": 1 + layers}


@pytest.mark.parametrize("phase", ["sft", "pretrain", "grpo"])
def test_npu_a_training_step_is_recorded_by_the_devices_own_graphs_and_played_bit_for_bit(
    phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if STANDIN is not None:
        monkeypatch.setattr(torch.get_device_module("npu"), "NPUGraph", lambda: Graph("npu"), raising=False)  # fmt: skip
    told: list[str] = []
    chip = open_accelerator("npu")
    record = chip.recorder("train")
    assert record is not None
    recorded = RecordedSteps(chip, record, tell=told.append, warn=told.append)
    plain = steps.stepper(chip)
    playing = Stepper(steps.stepper(chip).model, chip, router_bias_speed=1e-3, recorded=recorded)
    before, losses = torch.accelerator.current_stream(), []
    for stepper in (plain, playing):
        objective = steps.objectives(stepper)[phase]
        stepper.begin(objective)
        batch, played = objective.next_batch(1), False
        for step in range(1, RECORD_AFTER + TRIALS + 4):
            proposal = stepper.propose(replace(batch, step=step))
            stepper.commit(proposal)
            losses.append((stepper is plain, proposal.loss, proposal.grad_norm))
            played = played or proposal.played
    assert played and len(told) == 1
    assert torch.accelerator.current_stream() == before
    assert [one[1:] for one in losses if one[0]] == [one[1:] for one in losses if not one[0]]
    weights_of = [[one.cpu() for one in each.model_state().values()] for each in (plain, playing)]
    assert all(torch.equal(one, other) for one, other in zip(*weights_of, strict=True))


def test_npu_a_recording_that_breaks_says_what_broke_it_and_leaves_the_stream_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if STANDIN is not None:
        monkeypatch.setattr(torch.get_device_module("npu"), "NPUGraph", lambda: Graph("npu"), raising=False)  # fmt: skip
    chip, x, count = open_accelerator("npu"), torch.ones(3, device="npu"), [0]
    record, before = chip.recorder("train"), torch.accelerator.current_stream()
    assert record is not None

    def run() -> None:
        count[0] += 1
        if count[0] == 2:
            raise ValueError("the second time")

    with pytest.raises(ValueError, match="the second time"):
        record(run)
    assert torch.accelerator.current_stream() == before
    assert (x + 1).tolist() == [2.0, 2.0, 2.0]


@torch.inference_mode()
def said(made: Transformer, record: Any, speculate: int = 0) -> list[list[int]]:
    batch = Batch(made, slots=6, length=128, eos_id=-1, pad_id=0, record=record, speculate=speculate)  # fmt: skip
    rows = [Row([5 + at, 7, 9], Sampling(max_tokens=30 + 4 * at), index=at) for at in range(6)]
    batch.join([[row] for row in rows])
    while batch.rows:
        batch.step()
    assert bool(batch.guessed) == bool(speculate)
    return [row.said for row in rows]


def test_npu_a_decoding_step_with_experts_waits_for_nothing_and_can_be_recorded() -> None:
    made, record = open_accelerator("npu").move(model()).eval(), Recordings("npu")
    assert made.moe_layers()
    assert said(made, record) == said(made, None)
    assert record.played > 20


def test_npu_recorded_steps_take_guesses_as_plain_ones_do() -> None:
    made = Transformer(ModelConfig(preset="tick", num_nextn_predict_layers=1))
    weights.initialise(made, 0)
    made, record = open_accelerator("npu").move(made).eval(), Recordings("npu")
    assert said(made, record, 6) == said(made, None, 6) == said(made, None)
    assert record.played > 10


def test_npu_an_engine_goes_on_where_the_device_cannot_record_and_says_so() -> None:
    chip, troubles = open_accelerator("npu"), []
    engine = Engine(chip.move(model()).eval(), chip, eos_id=-1, pad_id=0, warn=troubles.append)
    asked = [[5, 7, 9], [6, 7]], Sampling(max_tokens=30)
    first, second = engine.generate(*asked), engine.generate(*asked, first_index=0)
    assert [one.tokens for one in first] == [one.tokens for one in second]
    if STANDIN is not None and hasattr(torch.accelerator, "Graph"):
        assert len(troubles) == 1 and "could not be recorded" in troubles[0]


@torch.inference_mode()
def test_npu_a_larger_model_decodes_in_bf16_near_fp32_and_as_a_judge_on_the_cpu_expects(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear, "LEAST_WEIGHTS", 1024)
    here, there = model().eval(), open_accelerator("npu").move(model()).eval()
    batch = Batch(there, slots=2, length=128, eos_id=-1, pad_id=0, precision="bf16", record=Recordings("npu"))  # fmt: skip
    assert batch.precision == "bf16"
    row = Row([5, 7, 9], Sampling(max_tokens=40))
    batch.join([[row]])
    types = Types()
    with types:
        while batch.rows:
            batch.step()
    assert types.seen["bmm"] | types.seen["mm"] >= {torch.bfloat16}
    text = [*row.prompt, *row.said]

    def read(judge: Transformer) -> torch.Tensor:
        logprobs_TV = judge(torch.tensor([text])).logits_BTV[0, len(row.prompt) - 1 : -1].log_softmax(-1)  # fmt: skip
        return logprobs_TV.gather(1, torch.tensor(row.said)[:, None])[:, 0]

    said = torch.tensor(row.logprobs)
    from_fp32 = (said - read(here)).square().mean().sqrt()
    from_judge = (said - read(linear.as_laid_out(here, torch.bfloat16, experts=True))).square().mean().sqrt()  # fmt: skip
    assert 1e-5 < from_fp32 < 0.05
    assert from_judge < from_fp32


@torch.inference_mode()
def test_npu_rollouts_in_bf16_follow_new_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "LEAST_WEIGHTS", 1024)
    chip = open_accelerator("npu")
    made = chip.move(model()).eval()
    full, half = (Engine(made, chip, eos_id=-1, pad_id=0, precision=one, warn=str) for one in ("fp32", "bf16"))  # fmt: skip
    asked = [[5, 7, 9], [6, 7]], Sampling(max_tokens=1, temperature=0.0)
    found = []
    for _ in range(2):
        there, here = ([row.logprobs[0] for row in one.generate(*asked)] for one in (full, half))
        assert here != there and here == pytest.approx(there, abs=0.05)
        found.append(here)
        made.lm_head.weight.mul_(3.0)
    assert found[0] != found[1]


class Types(TorchDispatchMode):
    """What matrix products were computed in."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[torch.dtype]] = {"mm": set(), "bmm": set()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in self.seen:
            self.seen[func.overloadpacket.__name__].add(made.dtype)
        return made


class Products(TorchDispatchMode):
    """Types of the linear layers' forward products: of head and routers, and of all else. (Attention in pieces sums in fp32 by itself.)"""

    def __init__(self, made: Transformer) -> None:
        super().__init__()
        self.seen: dict[str, set[torch.dtype]] = {"full": set(), "other": set()}
        self.where = "other"
        for part in (made.lm_head, *(moe.gate for moe in made.moe_layers())):
            part.register_forward_pre_hook(lambda *_: setattr(self, "where", "full"))
            part.register_forward_hook(lambda *_: setattr(self, "where", "other"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "addmm") and torch.is_grad_enabled():
            self.seen[self.where].add(made.dtype)
        return made


@pytest.mark.parametrize("phase", ["sft", "pretrain", "grpo"])
def test_npu_a_bf16_step_has_fp32_router_head_and_gradients_and_is_near_the_cpus(
    phase: str,
) -> None:
    found = []
    for chip in ("cpu", "npu"):
        stepper = steps.stepper(open_accelerator(chip))
        stepper.precision = "bf16"
        objective = steps.objectives(stepper)[phase]
        stepper.begin(objective)
        batch = objective.next_batch(1)
        with Products(stepper.model) as products:
            found.append(stepper.propose(batch))
        assert products.seen == {"full": {torch.float32}, "other": {torch.bfloat16}}
        assert {one.dtype for one in found[-1].grads.values()} == {torch.float32}
    here, there = found
    assert abs(here.loss - there.loss) < 0.02 * abs(here.loss) + 1e-2
    assert abs(here.grad_norm - there.grad_norm) < 0.1 * here.grad_norm


def test_npu_is_asked_which_products_it_is_faster_with() -> None:
    found = precision.decide("auto", open_accelerator("npu"), ModelConfig(preset="tick"))
    assert found.precision in ("fp32", "bf16") and "times as fast in bf16" in found.reason
