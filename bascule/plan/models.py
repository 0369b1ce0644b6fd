"""Models by name, by a Hugging Face `config.json`, or by a TOML table of sizes, read into a `Shape`."""

from __future__ import annotations

import csv
import functools
import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from importlib import resources
from pathlib import Path

from bascule.config.model import PRESETS, ModelConfig
from bascule.errors import RecipeError, nearest
from bascule.plan.architecture import Latent, Shape, from_config
from bascule.plan.hugging_face import from_hugging_face


@functools.cache
def named() -> dict[str, Shape]:
    """Public models by their common names, from `data/models.csv`; DeepSeek-V3 is the recipe preset `v3`."""
    path = resources.files("bascule.plan").joinpath("data/models.csv")
    with path.open(encoding="utf-8") as handle:
        return {row["name"]: _from_row(row) for row in csv.DictReader(handle)}


def _from_row(row: Mapping[str, str]) -> Shape:
    sizes = {
        f.name: (float if f.name == "cache_share" else int)(row[f.name])
        for f in fields(Shape)
        if f.name not in ("name", "tied") and row.get(f.name)
    }
    latent = {f.name: int(row[f.name]) for f in fields(Latent) if row.get(f.name)}
    sizes.setdefault("dense_layers", sizes["layers"])
    return Shape(
        name=row["name"],
        tied=row["tied"] == "1",
        latent=Latent(**latent) if latent else None,
        node_limit=3
        if row["name"] == "deepseek-v2"
        else 4
        if row["name"] == "deepseek-v3.2"
        else 0,
        **sizes,  # type: ignore[arg-type]
    )


ALIASES = {
    "deepseek-v3": "v3",
    "deepseek-r1": "v3",
    "deepseek-r2": "v3",
    "deepseek-v3.1": "v3",
    "llama-3-8b": "llama-3.1-8b",
    "llama-3-70b": "llama-3.1-70b",
    "llama-3.3-70b": "llama-3.1-70b",
    "llama-70b": "llama-3.1-70b",
    "llama-8b": "llama-3.1-8b",
    "llama-405b": "llama-3.1-405b",
    "qwen-7b": "qwen2.5-7b",
    "qwen-14b": "qwen2.5-14b",
    "qwen-32b": "qwen2.5-32b",
    "qwq-32b": "qwen2.5-32b",
    "qwen2.5-vl-72b": "qwen2.5-72b",
    "deepseek-v4": "deepseek-v4-pro",
    "glm-5.1": "glm-5",
    "glm-4.6": "glm-4.5",
    "glm-4.7": "glm-4.5",
    "kimi-k2.5": "kimi-k2",
    "minimax-m2.1": "minimax-m2",
    "minimax-m2.5": "minimax-m2",
    "kimi-k2.6": "kimi-k2",
}
# What papers append to a model's name that does not change its shape.
DECORATION = re.compile(
    r"[-_ ]?(instruct|chat|base|thinking|it|hf|fp8|fp4|nvfp4|bf16|w8a8|int8|awq|mxfp4|\d{4}|v0\.\d)(?=$|[-_ (/])|\(.*?\)"
)


def plain_name(text: str) -> str:
    """A paper's name for a model as `named` spells it: `meta-llama/Llama-3.1-70B-Instruct` is `llama-3.1-70b`."""
    owner, _, model = text.strip().lower().partition("/")
    word = model if model and not model.startswith(("r1", "v3")) else owner
    word = DECORATION.sub("", word).strip().replace("_", "-")
    return re.sub(
        r"\s+", "-", re.sub(r"^(llama|qwen|glm|kimi|gpt|mixtral)(?=\d)", r"\1-", word)
    ).replace("qwen-", "qwen")


def model_word(name: str) -> str:
    """One word for a model however a table or a user spells it, so that runs of the same model know each other."""
    key = ALIASES.get(name.lower(), name.lower())
    if key not in named():
        key = ALIASES.get(plain_name(name), plain_name(name))
    return "deepseek-v3" if key == "v3" else key


def model_named(name: str) -> Shape:
    """A preset, a public model's name, or the path of a `config.json` or a TOML table. Raises RecipeError with the nearest name."""
    if name.endswith(".json"):
        return _read(Path(name))
    if name.endswith(".toml"):
        return from_table(Path(name))
    if (Path(name) / "config.json").is_file():
        return _read(Path(name) / "config.json")
    key = ALIASES.get(name.lower(), name.lower())
    if key not in named() and key not in PRESETS:
        key = ALIASES.get(plain_name(name), plain_name(name))
    if key in named():
        return named()[key]
    if key in PRESETS:
        return from_config(ModelConfig.model_validate({"preset": key}), name=name)
    known = [*PRESETS, *named(), *ALIASES]
    raise RecipeError(
        f"'{name}' is not a model the planner knows.{nearest(key, known)} Known: {', '.join(known)}, or a path to a config.json or a TOML table."
    )


def from_table(path: Path) -> Shape:
    """A TOML table whose keys are `Shape`'s (and a `latent` table with `Latent`'s). Raises RecipeError naming a wrong key."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"The model table '{path}' cannot be read ({error}).") from None
    allowed = [f.name for f in fields(Shape)]
    for key in table:
        if key not in allowed:
            raise RecipeError(
                f"{path}: {key}: unknown key; allowed: {', '.join(allowed)}.{nearest(key, allowed)}"
            )
    least = [
        key for key in ("hidden", "layers", "heads", "head_dim", "ffn", "vocab") if key not in table
    ]
    if least:
        raise RecipeError(
            f"{path}: {', '.join(least)} {'is' if len(least) == 1 else 'are'} missing; a table needs at least hidden, layers, heads, head_dim, ffn and vocab."
        )
    table.setdefault("name", path.stem)
    table.setdefault("kv_heads", table.get("heads"))
    table.setdefault("dense_layers", 0 if table.get("experts") else table.get("layers"))
    try:
        latent = Latent(**table.pop("latent")) if "latent" in table else None
        return sound(Shape(latent=latent, **table), str(path))
    except TypeError as error:
        raise RecipeError(
            f"{path}: {str(error).replace('Shape.__init__() ', '')}. A table needs at least hidden, layers, heads, head_dim, ffn and vocab."
        ) from None


WIDEST = 10_000_000  # no size of a model is larger


def sound(shape: Shape, where: str) -> Shape:
    """The shape, if a model can have it. Raises RecipeError naming the size, what it is and what is allowed."""
    most = {"topk": shape.experts, "dense_layers": shape.layers, "local_layers": shape.layers, "kv_heads": shape.heads}  # fmt: skip
    needed = {"hidden", "layers", "heads", "kv_heads", "head_dim", "vocab"}
    needed |= {"topk", "moe_ffn"} if shape.experts else {"ffn"}
    sizes = {f.name: getattr(shape, f.name) for f in fields(Shape) if f.type == "int"}
    if shape.latent:
        needed |= {"kv_lora", "nope", "rope", "v"}
        sizes |= {
            f.name: getattr(shape.latent, f.name) or 0
            for f in fields(Latent)
            if f.name in needed | {"q_lora"}
        }
    for name, value in sizes.items():
        low, high = int(name in needed), most.get(name, WIDEST)
        if type(value) is not int or not low <= value <= high:
            raise RecipeError(
                f"{where}: {name} = {value!r} is no size of a model; a whole number from {low:,} to {high:,} is allowed."
            )
    return shape


def _read(path: Path) -> Shape:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise RecipeError(f"The model configuration '{path}' cannot be read ({error}).") from None
    if not isinstance(raw, dict):
        raise RecipeError(
            f"The model configuration '{path}' holds no object; give a decoder's Hugging Face config.json."
        )
    return sound(from_hugging_face(raw, name=path.parent.name or path.stem), str(path))


def shape_like(name: str, total_b: float | None, active_b: float | None) -> Shape | None:
    """The model that a table's own words mean: by name where we have its shape and its count agrees within a fifth, else a
    stand-in with its published counts (in billions); None when there are none."""
    word = plain_name(name)
    if "distill-" in word:  # the student's shape is the one that runs
        word = word.split("distill-")[1]
    known = sorted((one for one in named() if _same_model(word, one)), key=len, reverse=True)
    v3 = word.startswith(("deepseek-v3", "deepseek-r1")) and "deepseek-v3.2" not in known
    for one in ["v3"] if v3 else [word, *known]:
        try:
            shape = model_named(one)
        except RecipeError:
            continue
        if not total_b or abs(math.log(shape.parameters / (abs(total_b) * 1e9))) < 0.2:
            return shape
    if (total_b or 0) < 0 or (active_b or 0) < 0:
        return None
    if not total_b:
        total_b, active_b = counts_in(name)
    if not total_b:
        return None
    return stand_in(name, total_b * 1e9, (active_b or 0.0) * 1e9)


def _same_model(word: str, known: str) -> bool:
    """Whether a name begins with a known one and does not go on to another generation (`mistral-large-3`)."""
    return word.startswith(known) and not re.match(r"[-.]?\d(?!\d)", word[len(known) :])


# Counts that a name does not tell, in billions, from memory.
UNTOLD = {
    "step-3": (321.0, 38.0),
    "longcat-flash": (560.0, 27.0),
    "dots.llm1": (142.0, 14.0),
    "mistral-large-3": (675.0, 41.0),
    "hunyuan-a13b": (80.0, 13.0),
}


def counts_in(name: str) -> tuple[float | None, float | None]:
    """Total and active parameters in billions that a name tells: `ERNIE-4.5-300B-A47B`, `Ling-1T`, `Hunyuan-A13B`."""
    active = re.search(r"\bA(\d+(?:\.\d+)?)B", name, re.IGNORECASE)
    for house, counts in UNTOLD.items():
        if name.lower().startswith(house):
            return counts
    total = re.search(r"(?<![A-Za-z\d.])(\d+(?:\.\d+)?)\s?([BT])\b", name, re.IGNORECASE)
    used = float(active[1]) if active else None
    if total:
        return float(total[1]) * (1000 if total[2].upper() == "T" else 1), used
    return (used / USUAL_ACTIVE if used else None), used


USUAL_ACTIVE = (
    0.1  # share of a sparse model's parameters that a token uses, where only one count is told
)


def stand_in(name: str, total: float, active: float) -> Shape:
    """A plausible shape with these counts (`active` 0: not printed). Where it is sparse the cache is latent for the houses that
    use one, eight heads' keys and values elsewhere."""
    sparse = re.search(
        r"moe|a\d+b|flash|deepseek|kimi|maverick|mixtral|-1t\b|step-?3|longcat|ling|pangu",
        name.lower(),
    )
    active = active or (USUAL_ACTIVE * total if sparse else total)
    if active > 0.6 * total:
        layers = 80 if total > 5e10 else 32
        hidden = max(512, round(math.sqrt(total / layers / 13.3) / 128) * 128)
        return Shape(name=name, hidden=hidden, layers=layers, heads=hidden // 128, kv_heads=8, head_dim=128, ffn=round(3.5 * hidden), vocab=32000, dense_layers=layers)  # fmt: skip
    layers = 60
    hidden = max(1024, round(math.sqrt(active / layers / 12.0) / 256) * 256)
    experts, topk = 256, 8
    wide = max(128, round((total - 0.4 * active) / (layers * experts * 3 * hidden)))
    house = re.search(r"deepseek|kimi|pangu-?2|glm-5|mistral-large-3", name.lower())
    latent = Latent(q_lora=1536, kv_lora=512, nope=128, rope=64, v=128) if house else None
    selected = 2048 if re.search(r"v3\.2|v4|pangu-?2|glm-5", name.lower()) else 0
    return Shape(name=name, hidden=hidden, layers=layers, heads=max(16, hidden // 64), kv_heads=8, head_dim=128, ffn=4 * hidden, vocab=129280, latent=latent, experts=experts, topk=topk, moe_ffn=wide, shared_ffn=wide, selected=selected)  # fmt: skip
