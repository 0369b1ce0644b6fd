"""Rows in the format of inference.csv, read as operating points. The answer columns are looked at by `target_of` alone.

What a source does not print is filled by rule, the same for every row: 4,096 tokens in and 1,024 out, 100 ms a token,
no limit offline, and a replica whose weights take less than half of its memory.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace

from bascule.errors import RecipeError
from bascule.plan.architecture import Shape
from bascule.plan.catalogue import Chip, chip_like
from bascule.plan.job import precision_class
from bascule.plan.mlperf import MEAN_OF_LIMIT, NODE, Scenario, scenario
from bascule.plan.models import plain_name, shape_like
from bascule.plan.runs_table import Row, chips_in, number, tokens
from bascule.plan.serving import (
    LEAST_BATCH,
    SOFTWARE_TODAY,
    WEIGHT_BYTES,
    ServeConstants,
    Serving,
    as_run,
    memory_batch,
    rate,
)

ASSUMED_PROMPT, ASSUMED_COMPLETION = 4096, 1024
ASSUMED_TOKEN_MS = (
    100.0  # where a service prints no limit: what published throughputs of decoding services kept
)
FEW = 8.0  # sequences a chip up to which engines draft three tokens
ASSUMED_ACCEPTANCE = 0.7  # of a draft token, where a row names none
TOKENS_A_CHIP = (
    320e3  # of cache, in a replica whose size is not printed: what wide deployments of R1 keep
)
FILLED = 0.6  # of the memory, by the weights of the smallest replica that people use
GIANT = 3e11  # parameters from which a replica is spread over more chips than its weights need
MOST_CHIPS = 128
BALANCED = re.compile(r"(perfect|ideal|force|assume)\w*[^;.]{0,20}(balanc|eplb)|balanced experts")
APART = re.compile(r"disagg|dynamo|\bPDC?\b|llm-d|mooncake", re.IGNORECASE)
NAMED_SIZE = re.compile(r"(?:EP|TP|DP|NVL)(\d+)")
TRAINED_AT_4_BIT = ("deepseek-v4",)  # 4-bit weights, wider products
SOFTWARE = ("disagg sglang", "disagg", "sglang", "vllm", "tensorrt", "cloudmatrix", "deepseek")


def target_of(row: Row) -> tuple[str, float] | None:
    """What a row's answer is: (`rate` | `total` | `tpot`, value). Only fitting and scoring may call this."""
    for column, kind, scale in (
        ("out_tok_s_chip", "rate", 1.0),
        ("in_tok_s_chip", "rate", 1.0),
        ("total_tok_s_chip", "total", 1.0),
        ("tpot_ms", "tpot", 1e-3),
    ):
        value = number(row, column)
        if value is not None and value > 0:
            return kind, value * scale
    user = number(row, "tok_s_user")
    return ("tpot", 1 / user) if user is not None and user > 0 else None


def serving_of(row: Row) -> Serving:
    """A row as an operating point, from its inputs alone. Raises RecipeError for a chip or a model nobody knows."""
    shape, chip = served_shape(row), chip_like(row["chip"], row["vendor"])
    known = chips_of(row)
    precision, weight_bytes = precision_of(row, shape, chip, known or MOST_CHIPS)
    phase = phase_of(row)
    prompt, completion = _lengths(row)
    fewest = roomy_replica(shape, chip, weight_bytes)
    chips = known or fewest
    front = min(chips - 1, round(chips * _prefill_share(row))) if phase == "both" else 0
    bench = scenario(f"{row['family']} {row['phase']}", plain_name(row["model"]))
    limit = _limit_ms(row, bench)
    batch = _batch(row, chips - front)
    point = Serving(
        shape=shape,
        chip=chip,
        chips=chips,
        precision=precision,
        phase=phase,
        prompt=prompt,
        completion=completion,
        batch=batch,
        tpot_s=(limit or ASSUMED_TOKEN_MS) / 1e3,
        split=shape.moe
        and experts_spread(
            row["deployment"], alone=phase == "both" and not bench and chips <= NODE
        ),
        accepted=accepted(row["spec_decode"] or (bench.drafts if bench else ""), batch),
        prefill_chips=front,
        group=group_of(row["deployment"]),
        weight_bytes=weight_bytes,
        cached=_cached(row["prefix_cache"]),
        averaged="average" in row["notes"],
        varied=bench is not None,
        apart=phase == "both"
        and not front
        and bool(APART.search(f"{row['framework']} {row['deployment']}")),
        balanced=bool(BALANCED.search(f"{row['deployment']} {row['notes']}".lower())),
        software=_software(row),
        software_date=software_date(row),
    )
    return holding(_sized(row, point, known, fewest))


def _sized(row: Row, p: Serving, known: int | None, fewest: int) -> Serving:
    """The point on as many chips as the row names for one replica, or as rules say."""
    named = p.prefill_chips or p.group or NAMED_SIZE.search(row["deployment"])
    if known and (named or p.phase == "prefill"):
        return p
    if p.varied:
        size = max(fewest, NODE if p.shape.moe and p.shape.parameters > GIANT else 1)
        return replace(p, chips=min(known or size, size))
    if not known and p.batch is not None and p.batch * p.chips <= 1:
        size = max(fewest, NODE)  # a lowest latency is taken on a whole node
        return replace(p, chips=size, batch=p.batch * p.chips / size, split=False)
    sequences = None if known else number(row, "batch_or_concurrency")
    if sequences and "aggregat" in row["deployment"].lower().replace("disaggregat", ""):
        return replace(
            p, chips=fewest, batch=sequences / fewest, split=p.shape.moe and fewest > NODE
        )
    free = p.shape.moe and experts_spread(row["deployment"])
    return best_replica(p, fewest, known, sequences, free)


def holding(p: Serving) -> Serving:
    """A published point ran, so its weights fitted: without spread attention, or else on twice the chips, and so on."""
    if memory_batch(p) <= LEAST_BATCH and p.split:
        p = replace(p, split=False)
    while memory_batch(p) <= LEAST_BATCH and p.chips < 1024:
        group = p.group and 2 * p.group
        p = replace(p, chips=2 * p.chips, group=group, batch=p.batch and p.batch / 2)
    return p


def _limit_ms(row: Row, bench: Scenario | None) -> float | None:
    """The limit on a token's mean time: the row's own, else its benchmark's; none offline (a thousand seconds)."""
    own = milliseconds(row["slo_tpot_ms"])
    if own:
        return own * MEAN_OF_LIMIT if bench else own
    if bench and bench.token_ms:
        return bench.token_ms
    return 1e6 if bench or "offline" in row["phase"].lower() else None


def best_replica(
    p: Serving, fewest: int, most: int | None, sequences: float | None, free: bool
) -> Serving:
    """Where nobody printed how many chips serve together: the power of two that serves most tokens a chip within the limit, up
    to the whole system. Where only the concurrency is known, a giant is spread until a chip keeps 320 thousand tokens."""
    if sequences and p.batch is not None:
        chips = fewest
        while (
            p.shape.parameters > GIANT
            and chips < 256
            and sequences * p.context / (2 * chips) >= TOKENS_A_CHIP
        ):
            chips *= 2
        one = replace(p, chips=chips, batch=p.batch * p.chips / chips, split=False)
        crowded = (one.batch or 0.0) > memory_batch(one)
        return replace(one, split=free and (chips > NODE or crowded or bool(p.group)))
    least = min(fewest, most or fewest)
    ceiling = most or (MOST_CHIPS if p.shape.moe and p.phase != "prefill" else fewest)
    sizes = [least << i for i in range(10) if least << i <= ceiling]
    return max((replace(p, chips=n) for n in sizes), key=lambda q: rate(q, ServeConstants()))


def phase_of(row: Row) -> str:
    word = row["phase"].lower()
    return "prefill" if "prefill" in word else "decode" if "decod" in word else "both"


def precision_of(row: Row, shape: Shape, chip: Chip, chips: int) -> tuple[str, float]:
    """Class of the matrix products and bytes of a weight: 4-bit weights often meet wider activations. A precision nobody
    printed is the widest whose weights leave a quarter of the memory."""
    text = row["precision"].upper()
    if not text:
        fits = (
            name
            for name in ("bf16", "fp8")
            if shape.parameters * WEIGHT_BYTES[name] < 0.75e9 * chips * (chip.memory_gb or 64.0)
        )
        text = next(fits, "fp4").upper()
    if re.search(r"INT4|W4A16|AWQ|GPTQ", text):
        return "bf16", WEIGHT_BYTES["fp4"]
    if "W4A8" in text or ("FP4" in text and shape.name.startswith(TRAINED_AT_4_BIT)):
        return "fp8", WEIGHT_BYTES["fp4"]
    return as_run(shape, chip, precision_class(text))


def chips_of(row: Row) -> int | None:
    """Chips of one replica: a count, a count of nodes, else what the deployment names (`48P+16D`, EP144, NVL72)."""
    words = row["deployment"]
    if found := chips_in(row):
        return found
    if split := re.search(r"(\d+)P\s*\+\s*(\d+)D", words):
        return int(split[1]) + int(split[2])
    sizes = [int(size) for size in NAMED_SIZE.findall(words)]
    return max(sizes) if sizes else None


def experts_spread(words: str, *, alone: bool = False) -> bool:
    """Whether experts are spread with data-parallel attention: where the words name expert parallelism; else unless they name
    tensor parallelism, or the service is `alone` in one node, where nobody spreads experts without saying so."""
    if re.search(r"\bD?EP(?!1\b)\d+|DP-?attn|wide.?EP|disagg", words, re.IGNORECASE):
        return True
    return not alone and not re.search(r"\bTP(?!1\b)\d*\b", words)


def group_of(words: str) -> int | None:
    """Chips that share one copy of the weights, where the deployment names them: its decoding side's EP, else TP."""
    side = words[words.find("decode") :] if "decode" in words else words
    sizes = re.findall(r"\b(?:D?EP|TP)(\d+)", side)
    return max(int(size) for size in sizes) if sizes else None


def _prefill_share(row: Row) -> float:
    """Share of the chips that only prefill, where a disaggregated deployment names both sides."""
    split = re.search(r"(\d+)P\s*\+?\s*(\d+)D", row["deployment"]) or re.search(
        r"(\d+)\s*prefill\D{0,30}?(\d+)\s*(?:\w+ )?decod", row["deployment"].lower()
    )
    return int(split[1]) / (int(split[1]) + int(split[2])) if split else 0.0


def _batch(row: Row, decoding: int) -> float | None:
    """Sequences per decoding chip; None where the row names none."""
    text = row["batch_or_concurrency"].lower()
    if re.search(r"low.latency|single|bs\s*=?\s*1\b", text):
        return 1.0 / decoding
    count = number(row, "batch_or_concurrency")
    if count is None or count <= 0 or "token" in text:
        quick = "latency" in row["phase"].lower() and "high-throughput" not in row["published_unit"]
        return 1.0 / decoding if quick else None
    alone = phase_of(row) == "decode" and not re.match(r"\d+\b(?!\s*node)", row["chips"])
    per_chip = alone or re.search(r"(per|/)\s*(npu|gpu|chip|card|die|device|rank)", text)
    return count if per_chip else count / decoding


def milliseconds(text: str) -> float | None:
    """A latency cell in milliseconds: `50`, `50 ms`, `0.05 s`, `20 tok/s/user`."""
    found = re.search(r"([\d.]+)\s*(ms|s\b|tok)?", text)
    if not found or not float(found[1].strip(".") or 0):
        return None
    value = float(found[1].strip("."))
    return {"s": 1e3 * value, "tok": 1e3 / value}.get(found[2] or "", value)


def accepted(text: str, batch: float | None = None) -> float:
    """Tokens a decoding step yields: `MTP 1 (70% accept)` is 1.7; each further draft token is accepted after the one before.
    Where nobody counts the drafts, a chip with few sequences (`batch`) has arithmetic to spare for three."""
    word = text.lower()
    if not word or word in ("none", "no", "off", "-", "0"):
        return 1.0
    share = re.search(r"([\d.]+)\s*%", word)
    drafts = re.search(r"\b(\d)\b(?!\s*%)", word)
    rate = float(share[1]) / 100 if share else ASSUMED_ACCEPTANCE
    count = int(drafts[1]) if drafts else 3 if batch is not None and batch <= FEW else 1
    return sum(rate**i for i in range(1 + min(count, 8)))


def _cached(text: str) -> float:
    found = re.search(r"([\d.]+)\s*%", text)
    return min(0.95, float(found[1]) / 100) if found else 0.0


def roomy_replica(shape: Shape, chip: Chip, weight_bytes: float) -> int:
    """The smallest power of two of chips whose memory the weights fill to three fifths at most."""
    need = shape.parameters * weight_bytes / (FILLED * (chip.memory_gb or 64.0) * 1e9)
    return int(2 ** math.ceil(math.log2(max(1.0, need)) - 1e-9))


def _software(row: Row) -> str:
    text = f"{row['framework']} {row['deployment']}".lower()
    return next((word for word in SOFTWARE if word in text), "vendor")


def software_date(row: Row) -> float:
    """The year, with its fraction, that the row's words name (an MLPerf round, an arXiv number, a day); else this year's."""
    text = " ".join(row[key] for key in ("framework", "phase", "source", "notes"))
    if found := re.search(r"MLPerf v(\d)\.(\d)", text):
        return 2024.25 + (int(found[1]) - 4) + 0.45 * int(found[2])
    if found := re.search(r"arXiv:(2\d)([01]\d)\.|\b20(2\d)[-./_]?([01]\d)", text):
        year, month = (int(part) for part in found.groups() if part)
        return 2000 + year + month / 12
    found = re.search(r"\b(20[12]\d)\b", text)
    return int(found[1]) + 0.5 if found else SOFTWARE_TODAY


def _lengths(row: Row) -> tuple[float, float]:
    prompt, completion = tokens(row, "isl"), tokens(row, "osl")
    bench = scenario(f"{row['family']} {row['phase']}", plain_name(row["model"]))
    if prompt is None and bench:
        return bench.prompt, bench.completion
    if prompt is None and (cached := tokens(row, "kv_len")) is not None:
        return cached, completion or 1.0
    return prompt or ASSUMED_PROMPT, completion or (
        1.0 if phase_of(row) == "prefill" else ASSUMED_COMPLETION
    )


def served_shape(row: Row) -> Shape:
    """The row's model, by its name or its published parameter counts."""
    shape = shape_like(row["model"], number(row, "params_total_B"), number(row, "params_active_B"))
    if shape is None:
        raise RecipeError(
            f"'{row['id']}': the model '{row['model']}' is not known and its parameter count is missing or not above 0."
        )
    return shape
