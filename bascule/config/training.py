"""The sections that training reads: `[data]`, `[pretrain]`, `[sft]`, `[grpo]`, `[train]`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from bascule.config.section import Section

Precision = Literal["fp32", "bf16"]
"""What a training step computes its matrix products in (model/precision.py)."""


class TaskConfig(Section):
    """One family of problems. `name` is a built-in task or an entry point `package.module:task`."""

    name: str
    weight: float = Field(1.0, gt=0)
    options: dict[str, int | float | str | bool] = Field(default_factory=dict)


class DataConfig(Section):
    tasks: tuple[TaskConfig, ...] = Field((TaskConfig(name="chain_sum"),), min_length=1)
    train_problems: int = Field(
        20_000, ge=16, description="distinct training problems made at most"
    )
    worked_problems: int | None = Field(
        None,
        ge=1,
        description="SFT sees the worked solutions of so many training problems only; GRPO asks all of them",
    )
    verify_solutions: bool = Field(
        True,
        description="leave out worked solutions that their own verifier does not pay; false keeps the mistakes of the teacher",
    )
    eval_problems: int = Field(256, ge=1)
    eval_seed: int = Field(
        77291, description="held-out problems are drawn with this seed; no tuning looked at it"
    )


class PretrainConfig(Section):
    """Learning to read: next-token prediction on shards of text (`bascule tokenize`)."""

    data: str | None = Field(None, description="folder of shards written by bascule tokenize")
    steps: int = Field(1000, ge=0)
    batch_sequences: int = Field(16, ge=1)
    sequence_length: int = Field(256, ge=2, description="tokens of one training window")
    learning_rate: float = Field(3e-3, gt=0, description="AdamW: embeddings, head, norms, router")
    muon_learning_rate: float = Field(0.02, ge=0, description="Muon: matrices; 0 = AdamW for all")
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["wsd", "linear"] = Field(
        "wsd", description="wsd: full rate, then down in the last decay_ratio of the steps"
    )
    warmup_steps: int = Field(20, ge=0)
    decay_ratio: float = Field(0.2, gt=0, le=1)
    final_learning_rate_ratio: float = Field(0.0, ge=0, le=1)
    clip_grad_norm: float = Field(1.0, gt=0)
    document_mask: bool = Field(True, description="no token sees another document of its window")
    eval_sequences: int = Field(256, ge=1, description="held-out windows measured at most")


class SftConfig(Section):
    data: str | None = Field(
        None,
        description="JSON lines with `messages` to learn from; without it, the tasks' worked solutions",
    )
    steps: int = Field(800, ge=0)
    batch_sequences: int = Field(64, ge=1)
    pack_tokens: int = Field(
        0,
        ge=0,
        description="lay a batch's sequences end to end in rows of this length, masked from each other; 0 = one a row, padded",
    )
    learning_rate: float = Field(3e-3, gt=0, description="AdamW: embeddings, head, norms, router")
    muon_learning_rate: float = Field(
        0.02, ge=0, description="Muon: matrices, experts included; 0 = AdamW for all"
    )
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(20, ge=0)
    final_learning_rate_ratio: float = Field(0.0, ge=0, le=1)
    clip_grad_norm: float = Field(1.0, gt=0)


class GrpoConfig(Section):
    """GRPO: group advantage by mean only, token-level loss, clip-higher, no KL (training.md 2.6)."""

    algorithm: Literal["default", "grpo", "dr_grpo", "dapo", "gspo", "cispo"] = Field(
        "default",
        description="advantage and loss as published (train/policy.py); gspo wants clips near 3e-4",
    )
    steps: int = Field(
        150,
        ge=0,
        description="optimizer updates; each rollout batch serves `updates_per_rollout` of them",
    )
    prompts: int = Field(32, ge=1)
    group_size: int = Field(8, ge=2)
    updates_per_rollout: int = Field(2, ge=1)
    learning_rate: float = Field(3e-4, gt=0)
    final_learning_rate_ratio: float = Field(0.0, ge=0, le=1)
    warmup_steps: int = Field(0, ge=0)
    clip_low: float = Field(0.2, gt=0)
    clip_high: float = Field(0.28, gt=0)
    correction: Literal["none", "token", "sequence", "icepop"] = Field(
        "token", description="weight for the rollout engine's deviation (train/correction.py)"
    )
    importance_cap: float = Field(
        2.0, gt=0, description="truncated importance sampling of the rollout mismatch"
    )
    icepop_low: float = Field(0.5, gt=0, description="tokens whose ratio is below are masked")
    icepop_high: float = Field(5.0, gt=0, description="tokens whose ratio is above are masked")
    sequence_guard: float = Field(
        0.0,
        ge=0,
        description="mask samples whose geometric-mean ratio leaves 1 +- this; published 0.01, short answers 0.1; 0 = off",
    )
    router_replay: bool = Field(
        False,
        description="the trainer sends each token to the experts that the engine chose (R3, arXiv 2510.11370)",
    )
    one_step_off: bool = Field(
        False,
        description="sample the next rollout while this one is learnt from, with the weights of its start",
    )
    refill_rounds: int = Field(
        0,
        ge=0,
        description="dynamic sampling (DAPO): ask again, so often at most, for prompts in place of groups without contrast",
    )
    curriculum: Literal["none", "easy_first"] = Field(
        "none",
        description="easy_first: the easiest quarter of the prompts, all of them after half of the steps",
    )
    retire_after: int = Field(
        0,
        ge=0,
        description="leave a prompt out once its whole group was right so often running; 0 = never",
    )
    temperature: float = Field(1.0, gt=0)
    max_completion_tokens: int = Field(64, ge=1)
    clip_grad_norm: float = Field(1.0, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    min_start_pass_at_16: float = Field(
        0.2, ge=0, le=1, description="refuse to start when pass@16 of the start model is below this"
    )


class TrainConfig(Section):
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="of a step's matrix products; bf16 keeps weights, gradients, optimizer, router, head and loss in fp32. auto, decided once for "
        "the whole run: fp32 where a CPU trains first, else bf16 where the first chip is at least 1.5 times faster with it",
    )
    rollout_decoder: Literal["auto", "compiled", "operators"] = Field(
        "auto",
        description="how rollouts decode on CPU pools, the same for all pools: one compiled call a step, or torch's operators, "
        "which simulated faults of inference need; auto = compiled unless a pool simulates such a fault",
    )
    rollout_precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="of a larger model's matrices in rollouts; bf16 on other chips than CPUs, where it reads half the bytes (an Ascend has no units "
        "for fp32); what it costs stands in every step's mismatch figures",
    )
    record_steps: bool = Field(
        True,
        description="record forward and backward pass of a batch shape that was met eight times and play it back, on chips that have such a "
        "thing (CUDA graphs), if the recording gives the operators' very bits",
    )
    phases: tuple[Literal["pretrain", "sft", "grpo"], ...] = Field(("sft", "grpo"), min_length=1)
    steps: int | None = Field(
        None,
        ge=0,
        description="stop after this many steps in all; default: all steps of all phases",
    )
    snapshot_every_steps: int = Field(50, ge=1)
    keep_snapshots: int = Field(
        3, ge=2, description="certified generations kept; one must always lie behind the newest"
    )
    snapshots_gib: float | None = Field(
        None,
        gt=0,
        description="most that snapshots may take on the disk: certified generations are dropped, oldest first, but never the newest; unset: keep_snapshots alone",
    )
    snapshots: str | None = Field(
        None,
        min_length=1,
        description="fsspec URL (s3://, gs://, file://) that holds a copy of every snapshot, under the run's name; a run folder without snapshots takes up from there",
    )
    router_bias_speed: float = Field(
        1e-3, ge=0, description="auxiliary-loss-free balancing, sign update (DeepSeek-V3)"
    )
    balance_loss_weight: float = Field(
        0.0,
        ge=0,
        description="sequence-wise balance of experts in pretrain and sft; DeepSeek-V3 took 1e-4",
    )
    mtp_loss_weight: float = Field(
        0.3,
        ge=0,
        description="weight of the prediction layer's loss in pretrain and sft, where the model has one",
    )
    mtp_final_loss_weight: float = Field(0.1, ge=0, description="the same after mtp_switch_ratio")
    mtp_switch_ratio: float = Field(0.67, ge=0, le=1, description="share of the phase's steps")
