"""The run's records: what one room tells another, and what the ledger stores. No torch.

Every record is frozen, versioned, and stands alone: time, attempt and pool are in each line. Names may grow, meanings stay.
Units stand in the names (`_s`, `_bytes`, `_j`, `_ratio`). Statistics that cannot be worked out are None, never NaN.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

SCHEMA_VERSION = 1

Role = Literal["train", "infer"]
VerdictWord = Literal["fit", "unfit", "unproven"]
Attribution = Literal[
    "data",
    "optimisation",
    "transient chip fault",
    "persistent chip fault",
    "software",
    "link",
    "capacity",
    "unknown",
]
SnapshotState = Literal["saved", "verified", "witnessed", "certified", "rejected"]
Rung = Literal["start again", "another chip", "another pool"]


class Record(BaseModel):
    """Base of all records. `time_s` is Unix time; `attempt` counts launches of the run from 1 (0: outside a run)."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    schema_version: int = SCHEMA_VERSION
    time_s: float = Field(default_factory=time.time)
    attempt: int = 0
    pool: str | None = None


class RunStarted(Record):
    kind: Literal["run_started"] = "run_started"
    name: str
    version: str
    machine: str


class RunResumed(Record):
    kind: Literal["run_resumed"] = "run_resumed"
    from_step: int
    reason: str


class RunFinished(Record):
    kind: Literal["run_finished"] = "run_finished"
    final_weights_sha256: str
    steps: int
    wall_s: float


class RunStopped(Record):
    """The run ended early. The same command resumes it unless `final`."""

    kind: Literal["run_stopped"] = "run_stopped"
    reason: str
    exit_code: int
    final: bool = False


class RecipeResolved(Record):
    kind: Literal["recipe_resolved"] = "recipe_resolved"
    recipe_sha256: str
    recipe: dict[str, Any]


class Derivation(BaseModel):
    """One setting by the dial's rule, and where the rule comes from. `stated`: what the recipe says itself, which stays."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    setting: str
    value: int | float
    rule: str
    stated: int | float | None = None


class DialTurned(Record):
    """What the recipe left out beside `model.depth` or `model.preset`, derived by published rules (stages/dial.py)."""

    kind: Literal["dial_turned"] = "dial_turned"
    dial: str
    shape: str
    derived: tuple[Derivation, ...]


class ModelOrigin(Record):
    """The existing model that a run starts from. `sha256` covers the bytes of `files`, in the order of their names."""

    kind: Literal["model_origin"] = "model_origin"
    path: str
    format: Literal["huggingface", "gguf"]
    family: str
    parameters: int
    files: tuple[str, ...]
    sha256: str


class TextOpened(Record):
    """The shards a run pretrains on. `sha256` is that of their index, which names the hash of every file."""

    kind: Literal["text_opened"] = "text_opened"
    path: str
    sha256: str
    vocab_size: int
    train_tokens: int
    heldout_tokens: int


class LessonsDrawn(Record):
    """What SFT and GRPO learn from and are measured on: SHA-256 over every problem's task, key, question, answer and plain metadata, for
    training also over the file of conversations, where there is one."""

    kind: Literal["lessons_drawn"] = "lessons_drawn"
    train_sha256: str
    heldout_sha256: str
    train_problems: int
    heldout_problems: int


class OptionPriced(Record):
    """What the plan expects of one pool. `basis` says what the figures rest on (datasheet, measured, assumed)."""

    kind: Literal["option_priced"] = "option_priced"
    accelerator: str
    parameters: int
    memory_bytes: float
    memory_available_bytes: float | None
    fits: Literal["fits", "tight", "does not fit", "unknown"]
    train_s: float | None
    train_s_low: float | None = None
    train_s_high: float | None = None
    energy_j: float | None = None
    cost: float | None = None
    cost_unit: str | None = None
    basis: str
    memory_components_bytes: dict[str, float] = Field(default_factory=dict)
    train_components_s: dict[str, float] = Field(default_factory=dict)


class Evidence(Record):
    """One check's measured answer about one chip. `outcome`: `pass`, `fail`, `error` (the chip failed by exception, crash or
    hang), `not again` (passed now, failed when it was last asked), `skipped` (could not be asked, or too little to say; `detail`
    says why). `measured` against `bound`, and `reproduce`: a command."""

    kind: Literal["evidence"] = "evidence"
    check: str
    family: str
    roles: tuple[Role, ...]
    outcome: Literal["pass", "fail", "error", "not again", "skipped"]
    measured: dict[str, float | int | str | None] = Field(default_factory=dict)
    bound: str
    detail: str = ""
    reproduce: str = ""
    seconds: float = 0.0


CUT_OFF = "cut off by the time limit"
"""What a question says that the battery's time did not suffice for: nothing against the chip, and it can be gone on with."""


class Verdict(Record):
    """Bound to what was examined: chip, driver, libraries and model. Another of these, or age, makes it void (judge.outdated)."""

    kind: Literal["verdict"] = "verdict"
    role: Role
    verdict: VerdictWord
    reasons: tuple[str, ...]
    accelerator: str
    chip: str
    driver: str
    simulated: bool
    libraries: str = ""
    model_sha256: str = ""

    @property
    def cut_off(self) -> bool:
        return self.verdict == "unproven" and any(CUT_OFF in reason for reason in self.reasons)


class Placement(Record):
    """Role to pool. `reasons` says for each role why this pool and not the one preferred before it."""

    kind: Literal["placement"] = "placement"
    train: str
    infer: str
    reasons: dict[str, str]


class RolloutDecoder(Record):
    """How the rollout engines of all pools decode, decided once (place/rollout_decoder.py), and why."""

    kind: Literal["rollout_decoder"] = "rollout_decoder"
    decoder: Literal["compiled", "operators"]
    reason: str


class TrainPrecision(Record):
    """What every step of the run computes its products in (train/precision.py), decided before the first one, and why."""

    kind: Literal["train_precision"] = "train_precision"
    precision: Literal["fp32", "bf16"]
    reason: str


class StepsRecorded(Record):
    """A recording of a step's forward and backward pass that is played back from now on (train/recorded.py)."""

    kind: Literal["steps_recorded"] = "steps_recorded"
    step: int
    phase: str
    detail: str


class StepStats(Record):
    """One optimizer step that was committed. Losses are nats per token; `seconds` is the whole step. `layer_grad_norms`: 2-norm of
    each layer's gradient in the order of the model, four digits; empty in ledgers of before December 2026."""

    kind: Literal["step_stats"] = "step_stats"
    step: int
    phase: str
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    seconds: float
    reward: float | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    layer_grad_norms: tuple[float, ...] = ()


class MemoryPeak(Record):
    """The most memory that a trainer held while it trained a phase, or the part of it that this launch did: on a device the allocator's
    figure, on a CPU the process's resident set. Beside OptionPriced.memory_bytes."""

    kind: Literal["memory_peak"] = "memory_peak"
    phase: str
    peak_bytes: int


class Judgement(Record):
    """May this step commit? Stored when it may not, and for every audited step."""

    kind: Literal["judgement"] = "judgement"
    step: int
    commit: bool
    reason: str


class Alarm(Record):
    kind: Literal["alarm"] = "alarm"
    step: int
    sentinel: str
    measured: float | None
    bound: float | None
    detail: str


class Replay(BaseModel):
    """One recomputation of a suspicious step. `agrees`: with the step as first computed, within `bound`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    where: str
    agrees: bool
    error: float | None
    bound: float | None
    detail: str = ""


class Incident(Record):
    """Alarm, replays, attribution, action. `folder` (relative to the run) holds everything needed to replay it."""

    kind: Literal["incident"] = "incident"
    incident_id: str
    step: int
    sentinel: str
    attribution: Attribution
    action: str
    evidence: str
    replays: tuple[Replay, ...] = ()
    folder: str = ""
    rollback: bool = False
    """The launch ended over it: state since the last certified snapshot is not trusted until a Migration follows."""


class SnapshotEvent(Record):
    kind: Literal["snapshot"] = "snapshot"
    step: int
    state: SnapshotState
    path: str
    sha256: str
    reason: str = ""


class Coverage(Record):
    """What the guard's intervals buy, from the first judged step on, and anew whenever they change. Intervals in steps;
    `one_off_unseen` is the chance that a single wrong step passes unchecked; `persistent_steps` the steps within which a part that
    is always wrong is seen with 95 %."""

    kind: Literal["guard_coverage"] = "guard_coverage"
    step: int
    checksum_every: int
    audit_every: int
    parts: int
    one_off_unseen: float
    persistent_steps: int
    detail: str


class ProductsChecked(Record):
    """Products that the guard looked at by `step`, of `steps` steps, since its last such record; all were right."""

    kind: Literal["products_checked"] = "products_checked"
    step: int
    products: int
    steps: int


class PoolCondemned(Record):
    kind: Literal["pool_condemned"] = "pool_condemned"
    role: Role
    incident_id: str | None
    reason: str


class PoolReadmitted(Record):
    kind: Literal["pool_readmitted"] = "pool_readmitted"
    role: Role
    reason: str


class Migration(Record):
    """Training moved (or went back on the same pool). Corrupt or uncertain steps are left behind and counted. `rung`: of the
    ladder of fallback/policy; `wait_s`: its back-off; `trust`: of the snapshot that training goes on from."""

    kind: Literal["migration"] = "migration"
    from_pool: str
    to_pool: str
    failed_at_step: int
    resumed_from_step: int
    steps_recomputed: int
    seconds_lost: float
    snapshot: str
    rung: Rung | None = None
    wait_s: float = 0.0
    trust: SnapshotState | None = None


class Continuation(Record):
    """Recorded good steps replayed on the new pool. Not verified means the run does not continue there."""

    kind: Literal["continuation"] = "continuation"
    verified: bool
    steps: tuple[int, ...]
    max_error: float | None
    bound: float | None
    detail: str


class WeightsSynced(Record):
    kind: Literal["weights_synced"] = "weights_synced"
    version: int
    sha256: str
    size_bytes: int
    seconds: float


class Mismatch(Record):
    """Trainer against rollout engine, log-probabilities of the same sampled tokens (inference.md 5.1). `pool` is the engine's."""

    kind: Literal["mismatch"] = "mismatch"
    step: int
    mean_abs: float
    max_abs: float
    k1_kl: float
    k3_kl: float
    chi2: float
    effective_sample_ratio: float
    capped_ratio: float
    masked_ratio: float = 0.0
    router_agreement: float | None = None
    tokens: int


class Evaluation(Record):
    """Held-out problems, exact verifier. `after` names the phase; `extra` holds further figures (by task, lengths)."""

    kind: Literal["evaluation"] = "evaluation"
    after: str
    step: int
    n: int
    samples: int
    pass_at_1: float
    pass_at_8: float | None
    greedy: float
    truncated_ratio: float
    seconds: float
    extra: dict[str, float] = Field(default_factory=dict)


class TextEvaluation(Record):
    """Held-out text. `bits_per_byte` counts text tokens only, against the bytes they stand for, so that vocabularies compare;
    `nats_per_token` counts the end of a document too."""

    kind: Literal["text_evaluation"] = "text_evaluation"
    after: str
    step: int
    bits_per_byte: float
    nats_per_token: float
    tokens: int
    text_bytes: int
    seconds: float


class Warned(Record):
    """Any fallback, truncation, dropped sample or fresh start. `what` is a short stable word, `detail` the sentence."""

    kind: Literal["warning"] = "warning"
    what: str
    detail: str
    step: int | None = None


class WeightsRenewed(Record):
    """A server changed its weights while serving, after an audit whose worst difference of a log-probability was `worst`."""

    kind: Literal["weights_renewed"] = "weights_renewed"
    sha256: str
    folder: str
    worst: float
    seconds: float


class Admission(Record):
    """A foreign engine was examined before it could serve: largest differences of log-probabilities while it read and while it
    spoke, what was allowed, and what a wrong rotation would have shown."""

    kind: Literal["admission"] = "admission"
    engine: str
    arguments: tuple[str, ...] = ()
    accepted: bool
    reading: float
    speaking: float
    bound: float
    power: float
    tokens: int
    detail: str


class Telemetry(Record):
    kind: Literal["telemetry"] = "telemetry"
    power_w: float | None = None
    temperature_c: float | None = None
    memory_used_bytes: float | None = None
    energy_j: float | None = None


AnyRecord = Annotated[
    LessonsDrawn | RunStarted | RunResumed | RunFinished | RunStopped | RecipeResolved | DialTurned | OptionPriced | Evidence | Verdict | Placement | RolloutDecoder | TrainPrecision | StepsRecorded
    | StepStats | MemoryPeak | Judgement | Alarm | Incident | SnapshotEvent | PoolCondemned | PoolReadmitted | Migration | Continuation
    | WeightsSynced | Mismatch | Evaluation | Coverage | ProductsChecked | Warned | Telemetry | ModelOrigin | TextEvaluation | TextOpened | Admission | WeightsRenewed,
    Field(discriminator="kind"),
]  # fmt: skip

ADAPTER: TypeAdapter[AnyRecord] = TypeAdapter(AnyRecord)


@dataclass(frozen=True)
class RolloutRequest:
    """What the trainer asks of the rollout engine: `group_size` samples of every prompt. Spoken by train, infer and place.

    The reply is a pure function of the request and of the weights it names, so asking again is exact. Sample `g` of prompt `p`
    has the global index `first_index + p * group_size + g`; its random numbers depend on (seed, purpose, step, that index)
    and its position alone. With `weights_version` set, the engine answers with exactly that version or with an error.
    """

    step: int
    prompts: list[list[int]]
    group_size: int
    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    purpose: str = "rollout"
    first_index: int = 0
    routes: bool = False
    weights_version: int | None = None
    weights_path: str | None = None
    weights_sha256: str | None = None


@dataclass(frozen=True)
class Completion:
    """One sampled continuation. `tokens` ends with the end-of-sequence token when `finish` is `stop`; `logprobs[t]` is the
    log-probability of `tokens[t]` under softmax(logits / temperature) before any top-k, top-p or min-p cut (greedy: T=1)."""

    tokens: list[int]
    logprobs: list[float]
    finish: Literal["stop", "length"]
    routes: str = ""
    """With `RolloutRequest.routes`: the experts of every token but the last, prompt included; see infer/routes.py."""


@dataclass(frozen=True)
class RolloutReply:
    """Completions in the order of the global index (all samples of prompt 0, then of prompt 1, ...)."""

    completions: list[Completion]
    weights_version: int | None
    pool: str | None
    seconds: float
