"""Rows in the format of runs.csv and inference.csv, read as inputs. The answer columns are never looked at here.

A paper rarely prints the whole layout; what is missing is filled by rule (no free choice per row): no layout at all means fully
sharded data parallel, optimizer states are split (ZeRO-1) unless it says plain DDP, an unknown micro-batch is 1 (a sharded replica's whole batch), unknown recomputation is none, an unknown batch keeps a
pipeline busy with four micro-batches a stage, an unprinted schedule of a
pipeline is interleaved with two layers or more to a virtual stage, four virtual stages at most (two where only
`interleaved` is printed).
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bascule.errors import RecipeError
from bascule.plan.architecture import Latent, Shape
from bascule.plan.catalogue import chip_like, maker_of
from bascule.plan.job import Job, Layout, Recompute, precision_class
from bascule.plan.models import shape_like

Row = Mapping[str, str]

# The stack is an input of a run; papers name it in the family or the source. First match wins.
STACKS = {
    "automodel": "nemo-automodel", "nemo24|nemolong": "nemo", "fms-fsdp": "fms-fsdp", "megascale|megatron-lm": "megatron-lm",
    "simumax": "megatron-core, no overlap", "mbridge": "megatron-bridge", "megatron-bridge": "megatron-bridge", "torchtitan": "torchtitan",
    "mosaic": "llm-foundry", "llm-foundry": "llm-foundry", "megascale": "megascale", "korthikanti": "megatron-lm", "megatron": "megatron-lm",
    "mindspeed": "mindspeed", "maxtext": "maxtext", "ironwood": "maxtext", "v6e": "maxtext", "v5p": "maxtext", "v5e": "maxtext",
    "trn1": "neuronx", "gaudi": "habana", "primus": "primus", "pangu": "mindspeed", "llama3": "meta", "deepseek": "deepseek",
}  # fmt: skip


# Every column that a reader may look at; one that a table lacks reads as blank.
COLUMNS = (
    "id", "family", "vendor", "chip", "chips", "model", "notes", "source", "verified", "precision", "tier",
    "seq_len", "global_batch_seqs", "micro_batch", "tp", "pp", "vpp", "cp", "ep", "dp", "sharding", "recompute", "schedule_overlap",
    "layers", "hidden", "heads", "kv_heads", "head_dim", "ffn_hidden", "vocab", "experts", "topk", "moe_ffn", "shared_experts",
    "dense_layers_first", "attention", "arch_json", "params_total_B", "params_active_B", "framework", "deployment", "phase",
    "isl", "osl", "kv_len", "batch_or_concurrency", "prefix_cache", "spec_decode", "slo_ttft_s", "slo_tpot_ms", "published_unit",
    "tok_s_chip", "step_time_s", "d_tok_s_chip", "mem_GiB_chip_pub", "tpot_ms", "tok_s_user", "in_tok_s_chip", "out_tok_s_chip",
    "total_tok_s_chip",
)  # fmt: skip


def read_rows(path: Path) -> list[dict[str, str]]:
    """All rows of a table, cells stripped, columns that it lacks blank. A row without an id is named by its number, one without
    a family by its chip and model, and a table without tiers holds runs of tier A. Raises RecipeError when it cannot be read."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            head = handle.readline()
            handle.seek(0)
            apart = max(",;\t", key=head.count)  # what spreadsheets write where a comma is decimal
            reader = csv.DictReader(handle, delimiter=apart)
            reader.fieldnames = [column_name(name) for name in reader.fieldnames or ()]
            raw, header = list(reader), list(reader.fieldnames)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        do = " Save it as CSV in UTF-8." if isinstance(error, UnicodeDecodeError) else ""
        raise RecipeError(f"The table '{path}' cannot be read ({error}).{do}") from None
    for column in ("chip", "model"):
        if raw and column not in header:
            raise RecipeError(
                f"The table '{path}' has no column '{column}'; it must look like runs.csv or inference.csv."
            )
    blank = dict.fromkeys(COLUMNS, "") | ({} if "tier" in header else {"tier": "A"})
    rows = []
    for index, cells in enumerate(raw, 1):
        row = blank | {
            str(key).strip(): str(cell or "").strip()
            for key, cell in cells.items()
            if key is not None
        }
        row["id"] = row["id"] or f"row {index}"
        row["vendor"] = row["vendor"] or maker_of(row["chip"])
        row["family"] = row["family"] or f"{row['chip']}|{row['model']}"
        rows.append(row)
    return rows


SPELLED = {name.lower(): name for name in COLUMNS}


def column_name(text: str) -> str:
    """A column as `COLUMNS` spells it, whatever its case, spaces or hyphens: `Global batch seqs` is `global_batch_seqs`."""
    word = re.sub(r"[\s-]+", "_", text.strip())
    return SPELLED.get(word.lower(), word)


def has_column(rows: list[dict[str, str]], column: str) -> bool:
    return any(row[column] for row in rows)


NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


def number(row: Row, key: str) -> float | None:
    """A cell as a number: the first number in it ('1 per chip' is 1, '2K' is 2,000), None when there is none."""
    text = row.get(key) or ""
    found = NUMBER.search(text)
    if not found:
        return None
    multiple = re.match(r"\s?([kKM])(?![a-zA-Z])", text[found.end() :])
    value = float(found.group().replace(",", "")) * (
        {"k": 1e3, "m": 1e6}[multiple[1].lower()] if multiple else 1.0
    )
    return value if abs(value) < LARGEST else None


LARGEST = 1e18  # a cell beyond it holds no figure of a run


def tokens(row: Row, key: str) -> float | None:
    """A length in tokens: '8K' is 8,192; None when blank or below 1."""
    value = number(row, key)
    if value is None or value < 1:
        return None
    return value * 1.024 if re.search(r"\d\s?[kK]\b", row.get(key) or "") else value


CHIPS_A_NODE = 8


def chips_in(row: Row) -> int | None:
    """The cell `chips` as a count: `64 nodes` is 512, `2 x 8` is 16; None when blank or below 1."""
    text, count = row.get("chips") or "", number(row, "chips")
    if count is None or count < 1:
        return None
    if product := re.match(r"\s*(\d+)\s*[x\u00d7]\s*(\d+)", text):
        return int(product[1]) * int(product[2])
    return round(count) * (CHIPS_A_NODE if re.match(r"[\d,. ]+(nodes?|servers?)\b", text) else 1)


def whole(row: Row, key: str, default: int) -> int:
    value = number(row, key)
    return max(1, round(value)) if value is not None else default


SIZES = (
    "experts",
    "topk",
    "moe_ffn",
    "ffn_hidden",
    "dense_layers_first",
    "chips",
    "seq_len",
    "global_batch_seqs",
    "isl",
    "osl",
    "kv_len",
)


def shape_of(row: Row) -> Shape:
    """The model of a row. Raises RecipeError when the sizes that fix the FLOPs are not in it."""
    extra = _extra(row)
    missing = [key for key in ("layers", "hidden", "heads", "vocab") if number(row, key) is None]
    negative = [key for key in SIZES if (number(row, key) or 0) < 0]
    if negative:
        raise RecipeError(
            f"'{row.get('id')}': {', '.join(negative)} is negative; sizes are 0 or more."
        )
    if number(row, "experts") and not (number(row, "topk") and _expert_width(row)):
        missing.append("topk or moe_ffn")
    if missing:
        named = shape_like(
            row["model"], number(row, "params_total_B"), number(row, "params_active_B")
        )
        if named is not None:
            return named
        raise RecipeError(
            f"'{row.get('id')}': the model '{row.get('model')}' is not known, and its {', '.join(missing)} is missing."
        )
    layers, hidden, heads = whole(row, "layers", 1), whole(row, "hidden", 1), whole(row, "heads", 1)
    experts = int(number(row, "experts") or 0)
    moe_ffn = _expert_width(row) if experts else 0
    dense = int(number(row, "dense_layers_first") or 0) if experts else layers
    if extra.get("moe_every", 1) == 2:
        dense = layers // 2
    local, window = _windows(row["model"], str(extra.get("note", "")), layers)
    return Shape(
        name=row["model"],
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=whole(row, "kv_heads", heads),
        head_dim=whole(row, "head_dim", max(1, hidden // heads)),
        ffn=math.ceil(number(row, "ffn_hidden") or (0 if experts else 4 * hidden)),
        vocab=whole(row, "vocab", 1),
        gated=extra.get("ffn_matrices", 3) == 3,
        tied=bool(extra.get("tied_embeddings", False)),
        latent=_latent_of(extra),
        experts=experts,
        topk=min(experts, math.ceil(number(row, "topk") or 0)),
        moe_ffn=moe_ffn,
        shared_ffn=_whole_of(extra, "shared_ffn_total"),
        dense_layers=min(dense, layers),
        mtp_layers=0
        if "w/o MTP" in row.get("notes", "") or row.get("vendor") == "Google"
        else _whole_of(extra, "mtp_layers"),
        window=window,
        local_layers=local,
        node_limit=4
        if row["model"].startswith(("DeepSeek-V3", "DeepSeek-R1"))
        else 3
        if row["model"] == "DeepSeek-V2"
        else 0,
    )


def _expert_width(row: Row) -> int:
    return math.ceil(number(row, "moe_ffn") or number(row, "ffn_hidden") or 0)


def _extra(row: Row) -> dict[str, Any]:
    """What `arch_json` adds to the columns; a cell that holds no object (a remark, a dash) adds nothing."""
    try:
        found = json.loads(row.get("arch_json") or "{}")
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


LATENT_SIZES = ("kv_lora", "nope", "rope", "v")


def _latent_of(extra: Mapping[str, Any]) -> Latent | None:
    """Latent attention's sizes where `mla` names them all."""
    mla = extra.get("mla")
    if not isinstance(mla, dict) or not all(isinstance(mla.get(key), int) for key in LATENT_SIZES):
        return None
    return Latent(q_lora=mla.get("q_lora") or None, **{key: mla[key] for key in LATENT_SIZES})


def _whole_of(extra: Mapping[str, Any], key: str) -> int:
    value = extra.get(key)
    return int(value) if isinstance(value, (int, float)) and 0 < value < LARGEST else 0


def _windows(model: str, note: str, layers: int) -> tuple[int, int]:
    """(layers that see a window, window): from a row's note on its attention, else from the model's own config.json."""
    if model.startswith("Mistral-7B"):
        return layers, 4096
    if model.startswith(("Gemma2", "Gemma-2")):
        return layers // 2, 4096
    if "128-token sliding" in note:
        return layers // 2, 128
    if "5:1 local(1024)" in note:
        return layers * 5 // 6, 1024
    if "chunked attention 8192" in note:
        return layers * 3 // 4, 8192
    return 0, 0


def job_of(row: Row) -> Job:
    """A row of runs.csv as a job, from its inputs alone. Raises RecipeError naming what is missing."""
    shape = shape_of(row)
    chips = chips_in(row) or _printed_split(row)
    sequence = tokens(row, "seq_len") or ASSUMED_SEQUENCE
    layout = layout_of(row, chips, spread=shape.moe and shape.parameters > SPREAD)
    batch = number(row, "global_batch_seqs") or layout.micro_batch * layout.dp * (
        4 * layout.pp if layout.pp > 1 else 1
    )
    notes = row.get("notes", "")
    return Job(
        shape=shape,
        chip=chip_like(row["chip"], row["vendor"]),
        chips=chips,
        sequence=int(sequence),
        global_batch=max(1, round(batch)),
        precision=precision_class(row.get("precision", "")),
        layout=layout,
        software=stack_of(row),
        software_date=_container_date(notes),
        balanced="force-balanced" in notes,
    )


ASSUMED_SEQUENCE = 4096.0
SPREAD = 1e11  # parameters from which nobody trains a sparse model without pipeline and expert parallelism
SPREAD_PIPELINE, SPREAD_EXPERTS = 8, 64


def _printed_split(row: Row) -> int:
    """Chips of a run whose number nobody printed: what its layout needs, a node at least."""
    return max(CHIPS_A_NODE, math.prod(whole(row, key, 1) for key in ("tp", "pp", "cp", "dp")))


def layout_of(row: Row, chips: int, *, spread: bool = False) -> Layout:
    """The row's layout; blanks filled by rule. `spread`: a large sparse model, which is not run fully sharded alone."""
    sharding = row.get("sharding", "").lower()
    bare = not any(row.get(key) for key in ("tp", "pp", "ep")) and not sharding
    if bare and spread and chips >= SPREAD_EXPERTS:
        pp = SPREAD_PIPELINE if chips >= SPREAD_PIPELINE * SPREAD_EXPERTS else 1
        row = {**row, "pp": str(pp), "ep": str(SPREAD_EXPERTS), "sharding": "zero-1"}
        sharding = "zero-1"
    tp, cp = min(whole(row, "tp", 1), chips), whole(row, "cp", 1)
    pp = min(
        whole(row, "pp", 1), max(1, chips // (tp * cp))
    )  # a layout printed for a larger run cannot exceed the chips
    unknown = not row.get("tp") and not row.get("pp") and not sharding
    whole_shards = re.search(r"fsdp|hsdp|full.?shard|zero-?3", sharding)
    zero = 3 if whole_shards or unknown else 0 if sharding == "ddp" else 1
    zero = 2 if "shard_grad_op" in sharding or "zero-2" in sharding else zero
    overlap = row.get("schedule_overlap", "")
    vpp = _virtual(row, pp)
    schedule = (
        "zb"
        if "zero-bubble" in overlap.lower()
        else "dualpipe"
        if "dualpipe" in overlap.lower()
        else "interleaved"
        if vpp > 1
        else "1f1b"
    )
    return Layout(
        tp=tp,
        pp=pp,
        vpp=vpp,
        cp=cp,
        ep=whole(
            row, "ep", SPREAD_EXPERTS if spread and zero < 3 and chips >= SPREAD_EXPERTS else 1
        ),
        dp=max(1, chips // (tp * pp * cp)),
        zero=zero,
        micro_batch=whole(
            row,
            "micro_batch",
            _whole_local_batch(row, chips // (tp * pp * cp)) if zero == 3 and pp == 1 else 1,
        ),
        recompute=_recompute(row.get("recompute", ""), stack_of(row)),
        tp_overlap=any(word in overlap for word in ("MC2", "AsyncTP", "comm overlap", "MegaScale")),
        schedule=schedule,
    )


def _whole_local_batch(row: Row, dp: int) -> int:
    """Fully sharded runs take a replica's whole batch at once unless they say otherwise: each pass fetches all weights."""
    return max(1, round(whole(row, "global_batch_seqs", dp) / max(1, dp)))


def _virtual(row: Row, pp: int) -> int:
    text, overlap = row.get("vpp", ""), row.get("schedule_overlap", "")
    if "layers/virtual stage" in text:
        per_stage = number(row, "vpp") or 1
        return max(1, round(whole(row, "layers", 1) / pp / per_stage))
    if not text and pp > 1 and "interleaved" in overlap:
        return 2
    if not text and pp > 1 and not overlap:
        return max(1, min(4, whole(row, "layers", 1) // pp // 2))
    return whole(row, "vpp", 1)


def _recompute(text: str, stack: str) -> Recompute:
    word = text.lower()
    if not word and stack == "torchtitan":  # its default is op-level selective checkpointing
        return "selective"
    if word.startswith(("full", "custom", "qkv")):
        return "full" if word.startswith("full") else "selective"
    return "selective" if "selective" in word or "minimal" in word else "none"


def stack_of(row: Row) -> str:
    text = f"{row.get('family', '')} {row.get('source', '')}".lower()
    return next((stack for word, stack in STACKS.items() if word in text), "unknown")


def _container_date(notes: str) -> float | None:
    found = re.search(r"(?:container|software) (?:20)?(\d\d)[.-](\d\d)", notes)
    return 2000 + int(found.group(1)) + int(found.group(2)) / 12 if found else None
