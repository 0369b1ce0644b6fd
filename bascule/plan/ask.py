"""What people type, read into values: `2048 x H800, 14.8T tokens`, `H20, 4k in, 1k out, 50 ms`. Units are asked for, never guessed.

Every part after the chip is optional and comes in any order. A part that is not understood is refused with what would be.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from bascule.errors import RecipeError, nearest
from bascule.plan.architecture import Shape
from bascule.plan.ask_parts import (
    NUM,
    above_0,
    length,
    not_understood,
    parts_of,
    price_of,
    pue_of,
    quantity,
    taken,
    whole,
)
from bascule.plan.catalogue import Chip, find_chip
from bascule.plan.goodput import Recovery
from bascule.plan.job import Layout, Recompute, precision_class
from bascule.plan.runs_table import STACKS
from bascule.plan.schedule import SCHEDULES
from bascule.plan.speed import Speed, speed_of

PRECISIONS = ("bf16", "fp16", "fp8", "mxfp8", "fp4", "nvfp4", "int8")
SOFTWARE = {
    "NVIDIA": "megatron-bridge",
    "Huawei": "mindspeed",
    "Google": "maxtext",
    "AMD": "primus",
    "Intel": "habana",
    "AWS": "neuronx",
}


SERVERS = ("disagg sglang", "sglang", "vllm", "tensorrt", "cloudmatrix", "deepseek", "vendor")


def unheard_of(software: str, known: Iterable[str]) -> str:
    """A note where no published run tells of a stack; empty where one does, or none was named."""
    names = dict.fromkeys(known)
    if software in names or software in ("unknown", "bascule"):
        return ""
    return f"no published run tells of the software '{software}'; those of others are leaned on less.{nearest(software.lower(), names)} Known: {', '.join(names)}"


DEGREES = "tp|pp|cp|ep|dp|vpp|mb|zero"
LAYOUT = re.compile(rf"(?:(?:{DEGREES})-?\d+\s*)+")


@dataclass(frozen=True, kw_only=True)
class TrainAsk:
    """A training to be priced. `batch` in sequences (None: by rule); `price_usd_h` per chip-hour; `layout` None: to be searched;
    `measured`: what such a run did on the user's own chips."""

    text: str
    chip: Chip
    chips: int
    tokens: float
    sequence: int = 4096
    batch: int | None = None
    precision: str = "bf16"
    software: str = "unknown"
    price_usd_h: float | None = None
    pue: float | None = None
    failures: float | None = None
    layout: Layout | None = None
    schedule: str | None = None
    recompute: Recompute | None = None
    recovery: Recovery | None = None
    measured: Speed | None = None


@dataclass(frozen=True, kw_only=True)
class ServeAsk:
    """A service to be priced: lengths in tokens, limits in seconds; `chips` of one replica (None: chosen); `measured`: what such
    a service did on the user's own chips."""

    text: str
    chip: Chip
    chips: int | None = None
    prompt: int = 4096
    completion: int = 1024
    ttft_s: float = 2.0
    tpot_s: float = 0.05
    precision: str = "bf16"
    price_usd_h: float | None = None
    pue: float | None = None
    software: str = "unknown"
    measured: tuple[Speed, ...] = ()


TRAIN_UNSAID = {"tokens": -1.0, "sequence": -1, "batch": None, "precision": "", "software": "", "price_usd_h": None, "pue": None,
                "failures": None, "layout": None, "schedule": None, "recompute": None, "measured": None}  # fmt: skip
SERVE_UNSAID = {"prompt": -1, "completion": -1, "ttft_s": -1.0, "tpot_s": -1.0, "precision": "", "software": "", "price_usd_h": None,
                "pue": None}  # fmt: skip


def in_one(parts: Sequence[str]) -> list[str]:
    """The parts with all that is said of the layout (`TP4, PP8`) in one."""
    layout = [part for part in parts if LAYOUT.fullmatch(part.lower())]
    rest = [part for part in parts if part not in layout]
    return [*rest, " ".join(layout)] if layout else rest


def parse_train(
    text: str, extra: Mapping[str, Chip] | None = None, *, tokens: float | None = None
) -> TrainAsk:
    """`CHIPS x CHIP, TOKENS tokens[, fp8][, seq 4k][, batch 15360][, 2 USD/h][, PUE 1.2][, 6.5 failures][, TP4 PP8 ...]`.

    `tokens` is the default when the text names none (the option it is compared with has said it).
    """
    head, *rest = parts_of(text)
    ask = replace(started(text, head, extra), tokens=tokens or 0.0)
    ask = settled(taken(ask, in_one(rest), train_part, TRAIN_UNSAID))
    if ask.tokens <= 0:
        raise RecipeError(
            f"'{text}' does not say how many tokens; add for instance ', 14.8T tokens'."
        )
    return ask


def started(text: str, head: str, extra: Mapping[str, Chip] | None = None) -> TrainAsk:
    """The question that `2048 x H800` opens, everything else as usual for the chip."""
    found = re.fullmatch(r"([\d,.]+\s*[km]?)\s*[x×*]\s*(.+)", head, flags=re.IGNORECASE)
    if not found:
        raise RecipeError(
            f"'{text}' does not start with a number of chips and a chip; write for instance '2048 x H800, 14.8T tokens'."
        )
    chip = find_chip(found.group(2).strip(), extra)
    count = quantity(found.group(1))
    if not count or count < 1 or count != int(count):
        raise RecipeError(f"'{found.group(1).strip()}' is not a whole number of chips above 0.")
    eight = chip.fp8_tflops and chip.vendor in ("NVIDIA", "AMD") and (chip.year or 0) >= 2022
    return TrainAsk(
        text=text,
        chip=chip,
        chips=int(count),
        tokens=0.0,
        software=SOFTWARE.get(chip.vendor, "unknown"),
        price_usd_h=chip.price_usd_h,
        precision="fp8" if eight else "bf16",
    )


def settled(ask: TrainAsk) -> TrainAsk:
    """The question with what its parts say of each other: schedule and recomputation that are named are those of a given layout."""
    layout = ask.layout
    if layout and ask.recompute:
        layout = replace(layout, recompute=ask.recompute)
    if layout and ask.schedule:
        layout = _scheduled(layout, ask.schedule)
    return replace(ask, layout=layout)


def train_part(ask: TrainAsk, part: str) -> TrainAsk:
    """The question with one part more. Raises RecipeError naming what would be understood."""
    word = part.lower()
    if (speed := speed_of(part)) is not None:
        return replace(ask, measured=speed)
    if found := re.fullmatch(rf"({NUM}\s*[kmbt]?)\s*tokens?", word):
        return replace(ask, tokens=above_0(part, quantity(found.group(1))))
    if found := re.fullmatch(rf"(?:seq|sequence)\s*({NUM}\s*[km]?)", word):
        return replace(ask, sequence=whole(part, length(found.group(1))))
    if found := re.fullmatch(rf"batch\s*({NUM}\s*k?)", word):
        return replace(ask, batch=whole(part, quantity(found.group(1))))
    if word in PRECISIONS:
        return replace(ask, precision=precision_class(word))
    if (price := price_of(part)) is not None:
        return replace(ask, price_usd_h=price)
    if found := re.fullmatch(rf"pue\s*({NUM})", word):
        return replace(ask, pue=pue_of(found.group(1)))
    if found := re.fullmatch(rf"({NUM})\s*failures", word):
        return replace(ask, failures=above_0(part, quantity(found.group(1))))
    if found := re.fullmatch(r"recompute\s*(none|selective|full)", word):
        return replace(ask, recompute=cast(Recompute, found.group(1)))
    if LAYOUT.fullmatch(word):
        return replace(ask, layout=parse_layout(word, ask.chips))
    if word in SCHEDULES:
        return replace(ask, schedule=word)
    if found := re.fullmatch(rf"(save|detect|restart)\s*({NUM})\s*s", word):
        return replace(
            ask,
            recovery=replace(
                ask.recovery or Recovery(),
                **{f"{found.group(1)}_s": above_0(part, quantity(found.group(2)))},
            ),
        )
    if word.startswith("software "):
        return replace(ask, software=software_named(part[9:].strip(), STACKS.values()))
    if re.fullmatch(rf"{NUM}\s*[kmbt]?", word):
        small = f", 'seq {part}', 'batch {part}' or '{part} USD/h'"
        raise RecipeError(
            f"'{part}' has no unit; write '{part} tokens'{small if (quantity(word) or 0) < 1e9 else ''}."
        )
    raise not_understood(
        part,
        [
            "14.8T tokens",
            "seq 4k",
            "batch 15360",
            *PRECISIONS,
            "2 USD/h",
            "pue 1.2",
            "6.5 failures (per 1000 node-days)",
            "TP4 PP8 EP32 CP1 DP64 VPP2 MB1 ZERO1",
            "recompute none, selective or full",
            *SCHEDULES,
            "save 30 s",
            "detect 60 s",
            "restart 540 s",
            "software NAME",
            "measured 410 tokens/s/chip",
        ],
    )


def software_named(text: str, known: Iterable[str]) -> str:
    """A stack as the published runs call it, whatever its case and punctuation; one that is not among them keeps its name."""
    key = re.sub(r"[^a-z0-9]", "", text.lower())
    return next((one for one in known if re.sub(r"[^a-z0-9]", "", one) == key), text)


def parse_layout(text: str, chips: int) -> Layout:
    """`TP4 PP8 EP32 CP1 VPP2 MB1 ZERO1` as a layout; data parallel is what is left. Refuses one that does not divide the chips."""
    named = re.findall(rf"({DEGREES})-?(\d+)", text.lower())
    sizes = {name: int(value) for name, value in named}
    if len(sizes) < len(set(named)):
        raise RecipeError(f"'{text}' gives a degree twice; keep one of each.")
    tp, pp, cp = sizes.get("tp", 1), sizes.get("pp", 1), sizes.get("cp", 1)
    if (
        min(sizes.values(), default=1) < 1
        and sizes.get("zero", 1) >= 0
        and any(v < 1 for k, v in sizes.items() if k != "zero")
    ):
        raise RecipeError(f"'{text}': every degree must be 1 or more.")
    if chips % (tp * pp * cp):
        raise RecipeError(
            f"'{text}' needs a multiple of TP x PP x CP = {tp * pp * cp} chips; {chips} were given."
        )
    dp = chips // (tp * pp * cp)
    if sizes.get("dp", dp) != dp:
        raise RecipeError(
            f"'{text}' uses {sizes['dp'] * tp * pp * cp} chips and {chips} were given: that is DP{dp}."
        )
    if sizes.get("zero", 1) > 3:
        raise RecipeError(f"'{text}': ZERO0 to ZERO3 are allowed.")
    vpp, ep = sizes.get("vpp", 1), sizes.get("ep", 1)
    if (dp * cp * tp) % ep:
        raise RecipeError(
            f"'{text}': EP{ep} must divide the {dp * cp * tp} chips of one pipeline stage."
        )
    return Layout(
        tp=tp,
        pp=pp,
        cp=cp,
        ep=ep,
        dp=dp,
        vpp=vpp,
        micro_batch=sizes.get("mb", 1),
        zero=sizes.get("zero", 1),
        tp_overlap=True,
        schedule="interleaved" if vpp > 1 else "1f1b",
    )


def possible(layout: Layout, shape: Shape) -> None:
    """Refuse a given layout that this model cannot be cut into."""
    limits = {
        "TP": (layout.tp, shape.heads, "attention heads"),
        "PP x VPP": (layout.pp * layout.vpp, shape.layers, "layers"),
        "EP": (layout.ep, max(1, shape.experts), "experts"),
    }
    for name, (degree, most, what) in limits.items():
        if degree > most:
            raise RecipeError(
                f"{name} = {degree} is more than {shape.name} has {what}; 1 to {most} is allowed."
            )


def _scheduled(layout: Layout, schedule: str) -> Layout:
    """A given layout with a given pipeline schedule. Refuses pairs that no pipeline can run."""
    if (schedule == "interleaved") != (layout.vpp > 1):
        raise RecipeError(
            f"'{schedule}' with VPP{layout.vpp}: interleaved needs VPP2 or more, the other schedules need VPP1."
        )
    if schedule == "dualpipe" and layout.pp % 2:
        raise RecipeError(f"'dualpipe' needs an even number of stages; PP{layout.pp} was given.")
    return replace(layout, schedule=schedule)


def parse_serve(text: str, extra: Mapping[str, Chip] | None = None) -> ServeAsk:
    """`CHIP, 4k in, 1k out, 50 ms[, ttft 2 s][, 16 chips][, int8][, 2 USD/h]`; `8 x H20` gives the replica's size."""
    head, *rest = parts_of(text)
    if not head:
        raise RecipeError(
            "--serve names no chip; write for instance --serve 'H20, 4k in, 1k out, 50 ms'."
        )
    found = re.fullmatch(r"(\d+)\s*[x×*]\s*(.+)", head, flags=re.IGNORECASE)
    chip = find_chip(found.group(2) if found else head, extra)
    precision = "fp8" if chip.fp8_tflops else "int8" if chip.int8_tops else "bf16"
    ask = ServeAsk(
        text=text,
        chip=chip,
        chips=int(above_0(head, float(found.group(1)))) if found else None,
        price_usd_h=chip.price_usd_h,
        precision=precision,
    )
    return taken(ask, rest, serve_part, SERVE_UNSAID)


def serve_part(ask: ServeAsk, part: str) -> ServeAsk:
    """The question with one part more, as `train_part`."""
    word = part.lower()
    if (speed := speed_of(part, serving=True)) is not None:
        return replace(ask, measured=(*ask.measured, speed))
    if found := re.fullmatch(rf"({NUM}\s*[km]?)\s*(?:in|prompt)", word):
        return replace(ask, prompt=whole(part, length(found.group(1))))
    if found := re.fullmatch(rf"({NUM}\s*[km]?)\s*(?:out|completion)", word):
        return replace(ask, completion=whole(part, length(found.group(1))))
    if found := re.fullmatch(rf"(ttft|tpot)?\s*({NUM})\s*(ms|s)(?:\s*(ttft|tpot))?", word):
        seconds = float(found.group(2)) / (1000 if found.group(3) == "ms" else 1)
        if seconds <= 0:
            raise RecipeError(f"'{part}': a latency limit must be above 0.")
        return (
            replace(ask, ttft_s=seconds)
            if "ttft" in (found.group(1), found.group(4))
            else replace(ask, tpot_s=seconds)
        )
    if word.startswith("software "):
        return replace(ask, software=software_named(part[9:].strip(), SERVERS))
    if found := re.fullmatch(r"(\d+)\s*chips?", word):
        return replace(ask, chips=int(above_0(part, float(found.group(1)))))
    if word in PRECISIONS:
        return replace(ask, precision=precision_class(word))
    if (price := price_of(part)) is not None:
        return replace(ask, price_usd_h=price)
    if found := re.fullmatch(rf"pue\s*({NUM})", word):
        return replace(ask, pue=pue_of(found.group(1)))
    if re.fullmatch(NUM, word):
        raise RecipeError(
            f"'{part}' has no unit; write '{part} ms', '{part} in', '{part} out' or '{part} chips'."
        )
    raise not_understood(
        part,
        [
            "4k in",
            "1k out",
            "50 ms",
            "ttft 2 s",
            "16 chips",
            *PRECISIONS,
            "2 USD/h",
            "pue 1.2",
            "software NAME",
            "measured decode 1850 tokens/s/chip",
        ],
    )
