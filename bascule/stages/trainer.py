"""The training worker: one chip, one loop. Joins train, guard, place and fallback; started by stages/train through stages/child.

It leaves with an exit code and, for every error it understands, an ending file that says why in typed words. What it cannot
understand goes up as a traceback into its log and ends the process with code 1.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import signal
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bascule.accelerators.registry import open_accelerator
from bascule.config import read_resolved
from bascule.data.shards import Shards
from bascule.data.tasks.base import Problem
from bascule.data.text_tokenizer import open_or_own
from bascule.errors import (
    BasculeError,
    CheckFailed,
    DeviceFault,
    ModelFolderError,
    OperatorMissing,
    OutOfMemory,
    RecipeError,
    RolloutFailed,
    UsageError,
)
from bascule.fallback import verify
from bascule.folder import RunFolder
from bascule.guard import watchdog
from bascule.guard.guard import REMEMBERED_BATCHES, Guard
from bascule.guard.hindsight import led_to
from bascule.infer.evaluate import Score, evaluate
from bascule.infer.sampling import Sampling
from bascule.ledger import Ledger, last, of_kind
from bascule.model import existing, origin, weights
from bascule.model.transformer import Transformer
from bascule.place import sync
from bascule.place.client import RolloutClient
from bascule.records import (
    Completion,
    Evaluation,
    Migration,
    ModelOrigin,
    RolloutReply,
    RolloutRequest,
    RunFinished,
    RunStarted,
    SnapshotEvent,
    SnapshotState,
    StepStats,
    TextEvaluation,
    WeightsSynced,
)
from bascule.stages.course import Course, course
from bascule.stages.train import ENDING_FILE, STACKS_FILE
from bascule.train import checkpoint, loop, pretrain, rewards
from bascule.train.extra import Extended
from bascule.train.grpo import Grpo
from bascule.train.mismatch import mismatch_record
from bascule.train.objective import Objective
from bascule.train.sft import Sft
from bascule.train.state import TrainState
from bascule.train.step import Judge, NoJudge, Stepper


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Train one run on one pool.")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--pool", required=True)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--start", choices=["newest", "certified"], default="newest")
    parser.add_argument("--strict", action="store_true")
    options = parser.parse_args(arguments)
    folder = RunFolder(options.run)
    watchdog.arm_stacks(folder.heartbeats / STACKS_FILE)
    trainer: Trainer | None = None
    try:
        trainer = Trainer(
            folder, options.pool, options.attempt, options.socket, strict=options.strict
        )
        trainer.run(options.start)
    except (BasculeError, RuntimeError, MemoryError, OSError) as error:
        on_chip = trainer is not None and trainer.accelerator.device.type != "cpu"
        known = understood(error, on_chip=on_chip)
        if known is None:
            raise
        if known is not error:
            traceback.print_exc()
        watchdog.write_ending(folder.heartbeats / ENDING_FILE, known)
        return known.exit_code
    return 0


def understood(error: Exception, *, on_chip: bool) -> BasculeError | None:
    """What an error means for the run, or None for one of our own. `on_chip`: the work is done by a device with a runtime of its
    own, whose libraries report their failures as plain RuntimeErrors."""
    match error:
        case BasculeError():
            return error
        case torch.OutOfMemoryError() | MemoryError():
            return OutOfMemory(f"Memory is exhausted: {error}")
        case NotImplementedError():
            return OperatorMissing(f"The chip lacks an operator: {str(error).splitlines()[0]}")
        case torch.AcceleratorError():
            return DeviceFault(f"The chip's runtime gave up: {error}")
        case OSError():
            what = f"{error.strerror or error}: {error.filename or 'no file named'}"
            return UsageError(
                f"{what}. Nothing already written is lost; mend it and run the same command again."
            )
        case RuntimeError() if "can't allocate memory" in str(error):
            return OutOfMemory(f"Memory is exhausted: {error}")
        case RuntimeError() if on_chip:
            return DeviceFault(f"The chip's libraries failed: {error}")
    return None


class Trainer:
    def __init__(
        self, folder: RunFolder, pool: str, attempt: int, socket: Path, *, strict: bool = False
    ) -> None:
        self.folder = folder
        self.pool = pool
        self.heartbeat = folder.heartbeats / "trainer.json"
        self._beat(0, watchdog.STARTING)
        self.recipe = read_resolved(folder.recipe)
        self.ledger = Ledger(folder.ledger, attempt=attempt, pool=pool, strict=strict)
        self.accelerator = open_accelerator(
            self.recipe.pools[pool].accelerator,
            seed=self.recipe.seed,
            fault_log=folder.ground_truth / f"{pool}-train.jsonl",
        )
        self.accelerator.prepare(self.recipe.threads)
        if self.accelerator.fallback_note:
            self.ledger.warn("accelerator fallback", self.accelerator.fallback_note)
        self.course: Course = course(self.recipe, open_or_own(folder.tokenizer))
        self.stepper = Stepper(
            self._new_model(),
            self.accelerator,
            router_bias_speed=self.recipe.train.router_bias_speed,
        )
        self.objectives = self._objectives()
        self.plan = loop.Plan(
            self.recipe.phase_steps(), folder.snapshots, self.recipe.train.snapshot_every_steps
        )
        self.guard = self._new_guard() if self.recipe.guard.enabled else None
        self.client = RolloutClient(
            # The supervisor watches the engine's silence and restarts it; a slow engine that moves is waited for.
            socket,
            patience_s=math.inf,
            tries=10,
            on_wait=lambda: self._beat(self.stepper.step, "wait for rollouts"),
        )
        self._refuse_too_long()
        self.published: tuple[int, Path, str] | None = None
        self._stop = False
        signal.signal(signal.SIGTERM, self._on_sigterm)

    # ---- the run

    def run(self, start: str) -> None:
        """Start or resume, prove the continuation where the chip changed, train to the end, export, record."""
        state = self._resume(start)
        hooks = loop.Hooks(
            on_step=self._on_step,
            on_snapshot=self._on_snapshot,
            on_phase=self._on_phase,
            on_skip=lambda step, why: self.ledger.warn("batch skipped", why, step=step),
            should_stop=lambda: self._stop,
            extra=lambda: {"pool": self.pool},
        )
        judge: Judge = self.guard or NoJudge()
        state = loop.run(self.stepper, self.objectives, judge, state, self.plan, hooks)
        if self.guard:
            self._certify_last(state.step)
        if state.phase:
            self._evaluate_if_due(state.phase, state.step)
        self._export(state.step)

    def _trusted(self) -> SnapshotState:
        """The trust a snapshot needs to go back to: without a guard nothing is ever certified."""
        return "certified" if self.recipe.guard.enabled else "verified"

    def _resume(self, start: str) -> TrainState:
        """The newest snapshot that reads back whole (after a fault: the newest certified one), or a fresh start."""
        state = TrainState(
            recipe_sha256=hashlib.sha256(self.folder.recipe.read_bytes()).hexdigest()
        )
        path, passed_over = checkpoint.newest(
            self.folder.snapshots, at_least=self._trusted() if start == "certified" else "saved"
        )
        for reason in passed_over:
            self.ledger.warn("snapshot passed over", reason)
        if path is None:
            if last(self.ledger.read(), StepStats):
                self.ledger.warn(
                    "fresh start", "no usable snapshot was found: training begins again at step 1"
                )
            return state
        state, warnings = loop.resume(self.stepper, self.objectives, path, state)
        for text in warnings:
            self.ledger.warn("resumed elsewhere", text)
        self._remember(state)
        if checkpoint.load(path).extra.get("pool") != self.pool:
            verify.prove(path, self.stepper, open_accelerator("cpu"), self.ledger)
        if self.guard and checkpoint.trust(path).state != "certified":
            self.guard.after_snapshot(state.step, path)
        return state

    def _remember(self, state: TrainState) -> None:
        """Give the guard the memory it would have had without the interruption. A batch of GRPO cannot be made again."""
        if self.guard is None:
            return
        stats = led_to(self.ledger.read(), state.step)
        again = [one for one in stats if one.phase == state.phase and state.phase != "grpo"]
        self.guard.remember(
            stats,
            [
                self.objectives[state.phase].next_batch(one.step)
                for one in again[-REMEMBERED_BATCHES:]
            ],
        )

    # ---- hooks

    def _on_step(self, stats: StepStats) -> None:
        self._beat(stats.step, stats.phase)
        kept = {
            name: value for name, value in stats.metrics.items() if not name.startswith("mismatch_")
        }
        self.ledger.append(stats.model_copy(update={"metrics": kept}))
        found = mismatch_record(stats.step, stats.metrics, self._engine_pool)
        if found:
            self.ledger.append(found)

    def _on_snapshot(self, step: int, path: Path) -> None:
        self._beat(step, "snapshot")
        name = f"snapshots/{path.name}"
        if checkpoint.trust(path).state == "saved":
            checkpoint.verify(path)
            checkpoint.set_trust(path, "verified", "read back, hashes equal")
            self.ledger.append(
                SnapshotEvent(
                    step=step, state="verified", path=name, sha256=checkpoint.sha256(path)
                )
            )
        if self.guard:
            self.guard.after_snapshot(step, path)
        checkpoint.prune(
            self.folder.snapshots, self.recipe.train.keep_snapshots, at_least=self._trusted()
        )

    def _on_phase(self, phase: str, step: int) -> None:
        """A phase is about to begin: measure what the one before it reached, and refuse GRPO from a hopeless start."""
        phases = list(self.recipe.phase_steps())
        if phases.index(phase) > 0:
            self._evaluate_if_due(phases[phases.index(phase) - 1], step - 1)
        if phase == "grpo":
            self._refuse_hopeless_grpo()

    def _on_sigterm(self, *_: object) -> None:
        self._stop = True

    def _beat(self, step: int, phase: str) -> None:
        watchdog.beat(self.heartbeat, step, phase)

    # ---- rollouts and evaluation, on the pool placed for `infer`

    def sample(self, request: RolloutRequest) -> RolloutReply:
        """Ask the rollout engine, with exactly the weights of the last committed step."""
        version, path, sha256 = self._publish()
        request = replace(
            request,
            weights_version=version,
            weights_path=str(path.resolve()),
            weights_sha256=sha256,
        )
        try:
            reply = self.client.sample(request)
        except UsageError:
            raise  # what was asked is impossible on every chip
        except BasculeError as error:
            raise RolloutFailed(f"Rollouts failed at step {request.step}: {error}") from error
        self._engine_pool = reply.pool
        return reply

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, group_size: int = 1
    ) -> list[Completion]:
        """Engine.generate's words, answered by the rollout engine: evaluation runs where inference runs."""
        return self.sample(
            RolloutRequest(
                step=self.stepper.step, prompts=[list(prompt) for prompt in prompts], group_size=group_size,
                max_tokens=sampling.max_tokens, temperature=sampling.temperature, seed=sampling.seed, purpose=sampling.purpose,
            )
        ).completions  # fmt: skip

    _engine_pool: str | None = None

    def _publish(self) -> tuple[int, Path, str]:
        step = self.stepper.step
        if self.published is None or self.published[0] != step:
            start = time.perf_counter()
            path, sha256 = sync.publish(self.folder.weights, self.stepper.model.state_dict(), step)
            self.published = (step, path, sha256)
            size = path.stat().st_size
            self.ledger.append(
                WeightsSynced(
                    version=step,
                    sha256=sha256,
                    size_bytes=size,
                    seconds=time.perf_counter() - start,
                )
            )
        return self.published

    def _evaluate_text(self, step: int) -> None:
        """Bits per byte on the held-out shards, on the training chip: the engine samples and does not score."""
        if self._measured(TextEvaluation, "pretrain", step):
            return
        self._beat(step, "evaluate")
        start = time.perf_counter()

        def score(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
            self._beat(step, "evaluate")
            return self.stepper.score(tensors, max(1, step))

        config = self.recipe.pretrain
        found = pretrain.measure(
            score,
            self._reading("heldout"),
            rows=config.batch_sequences,
            windows=config.eval_sequences,
        )
        self.ledger.append(
            TextEvaluation(
                after="pretrain", step=step, bits_per_byte=found["bits_per_byte"], nats_per_token=found["nats_per_token"],
                tokens=int(found["tokens"]), text_bytes=int(found["text_bytes"]), seconds=time.perf_counter() - start,
            )
        )  # fmt: skip

    def _measured(
        self, kind: type[Evaluation] | type[TextEvaluation], after: str, step: int
    ) -> bool:
        """Was the model of `step` evaluated? What was measured before a rollback behind it was another model's."""
        found = False
        for record in self.ledger.read():
            if isinstance(record, kind) and record.step == step:
                found |= record.after == after if isinstance(record, Evaluation) else True
            elif isinstance(record, Migration) and record.resumed_from_step < step:
                found = False
        return found

    def _evaluate_if_due(self, after: str, step: int) -> None:
        if after == "pretrain":
            return self._evaluate_text(step)
        if self._measured(Evaluation, after, step):
            return
        self._beat(step, "evaluate")
        start = time.perf_counter()
        score = self._score(self.course.heldout, samples=self.recipe.evaluate.samples, ks=(1, 8))
        self.ledger.append(
            Evaluation(
                after=after, step=step, n=score.problems, samples=score.samples, pass_at_1=score.pass_at_1,
                pass_at_8=score.pass_at.get(8), greedy=score.greedy, truncated_ratio=score.truncated_ratio,
                seconds=time.perf_counter() - start, extra={"mean_completion_tokens": score.mean_tokens}, pool=self._engine_pool,
            )
        )  # fmt: skip

    def _score(
        self, problems: Sequence[Problem], *, samples: int, ks: tuple[int, ...], greedy: bool = True
    ) -> Score:
        return evaluate(
            self, self.course.prompts(problems), self.course.verifier(problems), samples=samples,
            max_tokens=self.recipe.grpo.max_completion_tokens, seed=self.recipe.seed, ks=ks, greedy=greedy,
        )  # fmt: skip

    def _refuse_too_long(self) -> None:
        """Before anything is computed: can every problem and its longest completion be read by the model?"""
        if "grpo" not in self.recipe.phase_steps() or not self.course.train:
            return
        longest = max(len(prompt) for prompt in self.course.prompts(self.course.train))
        asked = longest + self.recipe.grpo.max_completion_tokens
        allowed = self.course.model.max_position_embeddings
        if asked > allowed:
            raise RecipeError(
                f"grpo.max_completion_tokens={self.recipe.grpo.max_completion_tokens} and the longest problem's {longest} tokens make "
                f"{asked} positions; the model has {allowed}. Lower it, or raise model.max_position_embeddings."
            )

    def _refuse_hopeless_grpo(self) -> None:
        """Reinforcement needs some right answers to reinforce (training.md 2.7): stop before hours are spent on nothing."""
        floor = self.recipe.grpo.min_start_pass_at_16
        if floor <= 0:
            return
        score = self._score(self.course.train[:64], samples=16, ks=(1, 16), greedy=False)
        if score.pass_at[16] < floor:
            raise CheckFailed(
                f"GRPO was not started: the start model solves {score.pass_at[16]:.1%} of {score.problems} training problems in 16 tries "
                f"(pass@1 {score.pass_at_1:.1%}); grpo.min_start_pass_at_16 asks for {floor:.0%}. Train SFT longer, make the problems "
                "easier, or lower the bound if you know better."
            )

    # ---- parts

    def _new_model(self) -> Transformer:
        if self.course.model.from_:
            model = self._existing_model(Path(self.course.model.from_))
        else:
            model = Transformer(self.course.model)
            weights.initialise(model, self.recipe.seed)
        return self.accelerator.move(model)

    def _existing_model(self, path: Path) -> Transformer:
        """Raises ModelFolderError when the files are no longer those that the run began with."""
        began = last(self.ledger.read(), ModelOrigin)
        if began and origin.describe(path).sha256 != began.sha256:
            raise ModelFolderError(
                f"model.from = '{path}' is not the model this run began with (SHA-256 {began.sha256[:12]}…): its files changed. "
                "Put the old files back, or begin another run with --name."
            )
        model, _ = existing.load(path, positions=self.course.model.max_position_embeddings)
        return model

    def _objectives(self) -> dict[str, Objective]:
        steps = self.recipe.phase_steps()
        found: dict[str, Objective] = {}
        first = 1
        makers: dict[str, Callable[[int], Objective]] = {
            "pretrain": self._pretrain,
            "sft": self._sft,
            "grpo": self._grpo,
        }
        for phase in steps:
            found[phase] = self._extended(makers[phase](first))
            first += steps[phase]
        return found

    def _extended(self, objective: Objective) -> Objective:
        """With the extra loss terms of the phases that learn from given text; GRPO's loss stays as published."""
        model, config = self.course.model, self.recipe.train
        ahead = bool(model.num_nextn_predict_layers) and config.mtp_loss_weight > 0
        balance = model.ffn == "moe" and config.balance_loss_weight > 0
        if objective.phase == "grpo" or not (ahead or balance):
            return objective
        return Extended(objective, config, ahead, balance)

    def _reading(self, split: str) -> pretrain.Reading:
        config = self.recipe.pretrain
        shards = Shards.open(Path(str(config.data)))
        return pretrain.Reading(
            shards.text(split), config.sequence_length, shards.token_bytes(), config.document_mask
        )

    def _pretrain(self, first_step: int) -> pretrain.Pretrain:
        return pretrain.Pretrain(
            self.recipe.pretrain,
            self._reading("train"),
            seed=self.recipe.seed,
            first_step=first_step,
        )

    def _sft(self, first_step: int) -> Sft:
        examples = self.course.examples(self.recipe.seed)
        dropped = len(self.course.train) - len(examples)
        if dropped and not any(
            record.kind == "warning" and record.what == "traces dropped"
            for record in self.ledger.read()
        ):
            self.ledger.warn(
                "traces dropped",
                f"{dropped} of {len(self.course.train)} training problems have no trace that succeeds; SFT leaves them out",
            )
        return Sft(
            self.recipe.sft,
            examples,
            seed=self.recipe.seed,
            pad_id=self.course.tokenizer.pad_id,
            first_step=first_step,
        )

    def _grpo(self, first_step: int) -> Grpo:
        return Grpo(
            self.recipe.grpo, self.course.prompts(self.course.train), seed=self.recipe.seed, pad_id=self.course.tokenizer.pad_id,
            sampler=self.sample, score=self.stepper.score, reward=rewards.verifier(self.course.train, self.course.tokenizer), first_step=first_step,
        )  # fmt: skip

    def _new_guard(self) -> Guard:
        referee = open_accelerator("cpu")
        return Guard(
            self.recipe.guard, self.ledger, self.folder, self.pool, accelerator=self.accelerator, referee=referee,
            snapshots=checkpoint, experts_per_token=self.course.model.num_experts_per_tok,
        )  # fmt: skip

    def _certify_last(self, step: int) -> None:
        """No step follows the last snapshot, so one is computed for the referee and thrown away: the model that is exported
        comes from a certified state, or the chip leaves here with its incident."""
        path = checkpoint.path_of(self.folder.snapshots, step)
        if step == 0 or not path.exists() or checkpoint.trust(path).state == "certified":
            return
        assert self.guard is not None
        last_batch = self.objectives[self.plan.phase_of(step)].next_batch(step)
        for batch in (last_batch, *reversed(self.guard.recent)):
            probe = replace(batch, step=step + 1)
            if batch.empty:
                continue
            if self.stepper.objective is not self.objectives[batch.phase]:
                # A batch of the phase before, when this one never had anything to learn from. The optimizer is not needed any more.
                self.stepper.begin(self.objectives[batch.phase])
            if self.guard.certify_last(self.stepper.propose, probe, self.stepper):
                return
        self.ledger.warn(
            "last snapshot not certified",
            f"no batch at hand after step {step} has anything to learn from; the newest certified snapshot is older",
            step=step,
        )

    # ---- the end

    def _export(self, step: int) -> None:
        """Write the finished model in Hugging Face layout and close the run's books."""
        self._beat(step, "export")
        weights.save_hf(self.stepper.model, self.course.model, self.folder.model)
        self.course.tokenizer.save(self.folder.model)
        started = of_kind(self.ledger.read(), RunStarted)
        wall_s = time.time() - started[0].time_s if started else 0.0
        digest = weights.fingerprint(self.stepper.model)
        self.ledger.append(RunFinished(final_weights_sha256=digest, steps=step, wall_s=wall_s))
