"""Chips: what a datasheet or a paper says of each, with its source. Peaks are dense; bandwidths are one direction per chip.

The file `data/chips.csv` holds only figures for which a source was read; an empty cell means nobody printed it. `basis` is
`datasheet`, `assumed` where a figure was taken over from a sibling (the note says which), or `stand-in` where a table's chip
is not in the file and a sibling answers for it. A user's own chips come from TOML
tables with the same names, and figures that `qualify` measured replace the datasheet's (`with_measured`).
"""

from __future__ import annotations

import csv
import difflib
import functools
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from bascule.errors import RecipeError, nearest

Basis = Literal["datasheet", "measured on this machine", "assumed", "stand-in"]


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One kind of chip. TFLOPS are dense peaks; `*_gbs` GB/s in one direction per chip; `power_all_in_w` includes its share of
    host and network; `price_usd_h` per chip-hour, with `price_note` for date and kind. None: not published. `like`: the known
    chip that this one is a kind of; published runs on that one speak for it."""

    name: str
    vendor: str = "unknown"
    year: int | None = None
    status: str = ""
    bf16_tflops: float | None = None
    fp8_tflops: float | None = None
    fp4_tflops: float | None = None
    int8_tops: float | None = None
    memory_gb: float | None = None
    memory_tbs: float | None = None
    scaleup_gbs: float | None = None
    scaleup_p2p_gbs: float | None = None
    scaleup_chips: int | None = None
    scaleout_gbit_s: float | None = None
    tdp_w: float | None = None
    power_all_in_w: float | None = None
    price_usd_h: float | None = None
    price_note: str = ""
    gemm_bf16_tflops: float | None = None
    attention_tflops: float | None = None
    like: str = ""
    basis: Basis = "datasheet"
    source: str = ""
    note: str = ""

    @property
    def figures(self) -> str:
        """What its peaks and bandwidths are, in words."""
        return {
            "datasheet": "the chip's datasheet figures",
            "measured on this machine": "figures measured on this machine",
            "assumed": "figures assumed for the chip",
            "stand-in": "another chip's figures in its stead",
        }[self.basis]

    @property
    def kind(self) -> str:
        """The name that published runs know it by."""
        return self.like or self.name

    def peak_tflops(self, precision: str) -> float | None:
        """Dense peak at a precision class (`bf16`, `fp8`, `fp4`, `int8`); a chip without it computes at the next wider one."""
        for column in PRECISION_COLUMNS[precision]:
            value: float | None = getattr(self, column)
            if value:
                return value
        return None

    def wider_than(self, precision: str) -> str | None:
        """The precision class that `peak_tflops` answers with where the chip has no units for the one asked for."""
        own, *wider = PRECISION_COLUMNS[precision]
        found = next((column for column in wider if getattr(self, column)), None)
        return found.partition("_")[0] if found and not getattr(self, own) else None


ASSUMED_ALL_IN = 2.3  # all-in watts over the chip's TDP where nobody published the former; between B200's 2.2 and H100's 2.5
ASSUMED_POWER_W = 1500.0

PRECISION_COLUMNS = {
    "bf16": ("bf16_tflops",),
    "fp8": ("fp8_tflops", "bf16_tflops"),
    "fp4": ("fp4_tflops", "fp8_tflops", "bf16_tflops"),
    "int8": ("int8_tops", "fp8_tflops", "bf16_tflops"),
}

_FLOATS = {f.name for f in fields(Chip) if f.type.startswith("float")}
_INTS = {f.name for f in fields(Chip) if f.type.startswith("int")}


@functools.cache
def chips() -> dict[str, Chip]:
    """All chips of the shipped file, by name."""
    with (
        resources.files("bascule.plan").joinpath("data/chips.csv").open(encoding="utf-8") as handle
    ):
        return {row["name"]: _from_row(row) for row in csv.DictReader(handle)}


def _from_row(row: Mapping[str, str]) -> Chip:
    values: dict[str, Any] = {}
    for key, text in row.items():
        if text != "":
            values[key] = (
                float(text) if key in _FLOATS else int(float(text)) if key in _INTS else text
            )
    return Chip(**values)


# Words people and papers use for the rows of chips.csv. Compared without case, spaces, hyphens and brackets.
ALIASES = {
    "a100": "A100-80 SXM", "a100-80gb": "A100-80 SXM", "a100-80": "A100-80 SXM", "a100-40gb": "A100-40 SXM", "a100-40": "A100-40 SXM",
    "a800": "A800-80 SXM", "h100": "H100 SXM", "h800": "H800 SXM", "h20": "H20-96", "h200": "H200 SXM", "b200": "B200 SXM",
    "b300": "B300 SXM", "gb200": "GB200", "gb300": "GB300", "rubin": "Rubin", "mi250x": "MI250X (2 GCD)", "910c": "Ascend 910C",
    "910b": "Ascend 910B", "ascend910b": "Ascend 910B", "ascend910c": "Ascend 910C", "950dt": "Ascend 950DT", "950pr": "Ascend 950PR",
    "ironwood": "TPU7x Ironwood", "tpuv7": "TPU7x Ironwood", "trillium": "TPU v6e Trillium", "tpuv6e": "TPU v6e Trillium",
    "trn1": "Trainium1", "trn2": "Trainium2", "trn3": "Trainium3", "s5000": "MTT S5000", "s4000": "MTT S4000",
    "ppu": "PPU (T-Head)",
    "c500": "MetaX C500", "h100-96gb-500w(meta)": "H100-96 500W", "atlas900a2": "Ascend 910B",
    "ascend(a3,typenotprinted)": "Ascend 910C", "atlas800ia2": "Ascend 910B", "atlas800ta2": "Ascend 910B", "atlas900a3": "Ascend 910C",
    "atlas800ia3": "Ascend 910C", "atlas800ta3": "Ascend 910C", "cloudmatrix384": "Ascend 910C", "tpu7x": "TPU7x Ironwood",
}  # fmt: skip


def _key(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def find_chip(name: str, extra: Mapping[str, Chip] | None = None) -> Chip:
    """Look a chip up by name or alias; `extra` (a user's own chips) comes first. Raises RecipeError with the nearest name."""
    known = {**chips(), **(extra or {})}
    keys = {_key(alias): target for alias, target in ALIASES.items()} | {
        _key(chip): chip for chip in known
    }
    if _key(name) in keys:
        return known[keys[_key(name)]]
    words = {**{alias: alias for alias in ALIASES}, **{chip.lower(): chip for chip in known}}
    inside = [word for word in words if len(_key(word)) >= 3 and _goes_by(_key(word), _key(name))]
    hint = nearest(name.lower(), words)
    if inside:  # `NVIDIA H100 80GB HBM3`, or a question without its commas
        hint = f" Did you mean '{max(inside, key=len)}'?"
        hint += " Parts are set apart by commas." * bool(
            re.search(r"\d\s*(ms|in|out)\b|tokens", name)
        )
    raise RecipeError(
        f"'{name}' is not a chip the planner knows.{hint} Known: {', '.join(sorted(known))}; your own with --chips FILE.toml."
    )


MAKERS = {
    "NVIDIA": r"^(nvidia|[abhl]\d{2,3}|gb\d|gh\d|rtx|rubin|v100)",
    "AMD": r"^(amd|instinct|mi\d)",
    "Huawei": r"ascend|^91\d|^95\d|atlas|cloudmatrix",
    "Google": r"^(tpu|google|v\d[ep]?$|ironwood|trillium)",
    "AWS": r"^(aws|trn|trainium)",
    "Intel": r"gaudi|^(intel|habana)",
    "Moore Threads": r"^(mtt|moore|s\d000)",
}
# Makers of whom nothing usable is published: their training chips are of this one's class.
OF_A_CLASS = {
    "Kunlun": r"kunlun|p800|baidu", "Cambricon": r"cambricon|mlu", "Hygon": r"hygon|\bdcu", "Biren": r"biren|^br\d",
    "MetaX": r"metax|^c\d00", "Enflame": r"enflame", "Iluvatar": r"iluvatar", "T-Head (Alibaba)": r"t-?head|^ppu",
}  # fmt: skip
CLASS = "Ascend 910B"
FORMS = re.compile(
    r"gb|sxm|pcie|nvl|hbm|xlarge|super|pod|node|npu|gpu|die|card|chip|ultra|trillium|ironwood|xtrans"
)
LIKENESS = {
    True: 0.4,
    False: 0.6,
}  # by whether the name itself tells the maker, or only the table does


def _goes_by(key: str, word: str) -> bool:
    """Whether a table's words hold this name, and what follows it is a size, a form or a bin, not another model's letter."""
    if key not in word:
        return False
    rest = word[word.index(key) + len(key) :]
    return not re.match(r"[a-z]", rest) or bool(FORMS.match(rest))


def classed(name: str, vendor: str = "") -> str:
    """The maker whose chips another's stands in for, told by a chip's name or a table's vendor; blank for all others."""
    words = f"{name.strip()} {vendor}".lower()
    return next((one for one, form in OF_A_CLASS.items() if re.search(form, words)), "")


def maker_of(name: str) -> str:
    """Whose chip it is by a table's own words, not the stand-in's maker; blank when nobody knows."""
    try:
        found = chip_like(name)
    except RecipeError:
        return ""
    return (classed(name) if found.basis == "stand-in" else "") or found.vendor


def chip_like(name: str, vendor: str = "") -> Chip:
    """The chip that a table's own words mean: `find_chip`, else the longest known name inside them (`Ascend 910B3`,
    `8 x H100 80GB SXM5`), else the maker's chip with the most similar name, whose note says so. Raises RecipeError when no
    maker is recognised either: a guess would rest on nothing."""
    try:
        return find_chip(name)
    except RecipeError as error:
        refusal = error
    word = _key(name)
    keys = {_key(alias): target for alias, target in ALIASES.items()}
    keys |= {_key(chip): chip for chip in chips()}
    inside = [key for key in keys if len(key) >= 3 and _goes_by(key, word)]
    if inside:
        return chips()[keys[max(inside, key=len)]]
    if classed(name, vendor):
        note = f"nothing usable is published on '{name}'; {CLASS} stands in for its class"
        return replace(chips()[CLASS], basis="stand-in", note=note)
    told = next((one for one, form in MAKERS.items() if re.search(form, name.strip().lower())), "")
    maker = told or vendor
    scored = [
        (
            round(difflib.SequenceMatcher(None, _key(alias), word).ratio(), 1),
            chips()[target].year or 0,
            target,
        )
        for alias, target in keys.items()
        if chips()[target].vendor == maker
    ]
    if not scored or max(scored)[0] < LIKENESS[bool(told)]:
        raise refusal
    nearest_one = chips()[max(scored)[2]]  # of names equally alike, the newest
    note = f"'{name}' is not in the catalogue; {nearest_one.name} stands in for it"
    return replace(nearest_one, basis="stand-in", note=note)


def chips_from_toml(path: Path) -> dict[str, Chip]:
    """A user's own chips: one table per chip, keys as in `Chip`. Raises RecipeError naming a wrong key or value."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"The chip file '{path}' cannot be read ({error}).") from None
    allowed = [f.name for f in fields(Chip) if f.name != "name"]
    if set(tables) == {"chips"} and isinstance(tables["chips"], dict):
        tables = tables["chips"]  # [chips."my chip"] says the same as ["my chip"]
    result = {}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise RecipeError(
                f"{path}: '{name}' is a value outside a table; write [\"chip name\"] above the figures."
            )
        for key, value in table.items():
            if key not in allowed:
                raise RecipeError(
                    f"{path}: [{name}] {key}: unknown key; allowed: {', '.join(allowed)}.{nearest(key, allowed)}"
                )
            least = "0 or more" if key == "price_usd_h" else "above 0"
            numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
            if key in _FLOATS | _INTS and not (numeric and (value > 0 or (value == 0 and "more" in least))):  # fmt: skip
                raise RecipeError(f"{path}: [{name}] {key}={value!r} must be a number {least}.")
            if key not in _FLOATS | _INTS and not isinstance(value, str):
                raise RecipeError(f"{path}: [{name}] {key}={value!r} must be words in quotes.")
        result[name] = _own_chip(name, table)
    return result


def _own_chip(name: str, table: Mapping[str, Any]) -> Chip:
    """A user's chip: all its figures its own, or those of a known chip that it is `like` with its own in their place."""
    if "like" not in table:
        return Chip(name=name, **table)
    base = find_chip(table["like"])
    said = {"note": ""} | ({"price_note": ""} if "price_usd_h" in table else {})
    return replace(base, **{**said, **table, "name": name, "like": base.name})


def with_measured(chip: Chip, measured: Mapping[str, float]) -> Chip:
    """Put figures that `qualify` measured in place of the datasheet's. Keys as in `Chip`; others are ignored."""
    found = {key: value for key, value in measured.items() if key in _FLOATS}
    return replace(chip, **found, basis="measured on this machine") if found else chip  # type: ignore[arg-type]


def power_w(chip: Chip) -> tuple[float, str]:
    """All-in watts of a chip with its share of host and network, and what they rest on."""
    if chip.power_all_in_w:
        known = chips().get(chip.kind)
        published = known is not None and known.power_all_in_w == chip.power_all_in_w
        return (
            chip.power_all_in_w,
            "derived from published rack or service figures"
            if published
            else "the chip file's own figure",
        )
    if chip.tdp_w:
        return (
            chip.tdp_w * ASSUMED_ALL_IN,
            f"assumed {ASSUMED_ALL_IN} x the TDP of {chip.tdp_w:.0f} W",
        )
    return ASSUMED_POWER_W, "assumed; no power is published for this chip"
