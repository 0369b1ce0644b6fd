"""From a TOML file and `--set` overrides to a checked recipe; every refusal names the key's path, the value, what is allowed, and the nearest right name."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from bascule.config.recipe import Recipe
from bascule.config.training import TaskConfig
from bascule.config.trust import PoolConfig
from bascule.errors import RecipeError, nearest


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a TOML recipe, apply `key.path=value` overrides (values in TOML syntax, bare words are strings), check, freeze.

    Raises RecipeError with the key's path, the value, what is allowed and the nearest right name.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin with a mark
    except (FileNotFoundError, NotADirectoryError):
        raise RecipeError(
            f"The recipe '{path}' does not exist. Give the path of a TOML file, for instance runs/demo.toml."
        ) from None
    except IsADirectoryError:
        raise RecipeError(
            f"'{path}' is a folder, not a recipe. Give the path of a TOML file, for instance runs/demo.toml; a run's own recipe is the one it was begun with."
        ) from None
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"The recipe '{path}' is not UTF-8 text (byte {error.start}). Save it as UTF-8."
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"The recipe '{path}' is not valid TOML: {error}.") from None
    raw.setdefault("name", path.stem)
    for override in overrides:
        _apply_override(raw, override)
    return recipe_from(raw, source=str(path))


def recipe_from(raw: Mapping[str, Any], *, source: str) -> Recipe:
    """Check a plain mapping as a recipe. `source` is named in the error."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(
            "\n".join([f"The recipe {source} is refused:", *_explain(error)])
        ) from None


def read_resolved(path: Path) -> Recipe:
    """Read a run folder's `recipe.json`. Raises RecipeError when it is missing or was written by an incompatible version."""
    try:
        return recipe_from(json.loads(path.read_text(encoding="utf-8")), source=str(path))
    except (FileNotFoundError, NotADirectoryError):
        raise RecipeError(
            f"'{path.parent}' is not a run folder: it has no recipe.json. Give the folder under out/."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"'{path}' is damaged ({error}). Restore it from the recipe with the same overrides."
        ) from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    dotted, sign, text = override.partition("=")
    if not sign or not dotted:
        raise RecipeError(
            f"--set '{override}' is not KEY.PATH=VALUE, for instance --set train.steps=20."
        )
    try:
        value = tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, leaf = dotted.strip().split(".")
    here = raw
    for parent in parents:
        here = here.setdefault(parent, {})
        if not isinstance(here, dict):
            raise RecipeError(f"--set {dotted}: '{parent}' is a value, not a section.")
    here[leaf] = value


TYPES = {
    "int_type": "must be a whole number, without quotes and without a point",
    "float_type": "must be a number, without quotes",
    "bool_type": "must be true or false, without quotes",
    "string_type": "must be text in quotes (--set KEY='\"TEXT\"' where it looks like a number)",
    "tuple_type": 'must be a list, for instance ["one", "two"]',
    "dict_type": "must be a section: a [TABLE] or { KEY = VALUE }",
    "model_type": "must be a section: a [TABLE] or { KEY = VALUE }",
    "too_short": "must hold one at least",
    "finite_number": "must be a finite number",
}
"""pydantic's names for a value of the wrong type, in the words of TOML."""


def _explain(error: ValidationError) -> list[str]:
    lines = []
    refused: dict[tuple[str, str], list[str]] = {}
    for item in error.errors():
        where = ".".join(_path(item["loc"])) or "recipe"
        if item["type"] == "extra_forbidden":
            allowed = sorted(_allowed_at(item["loc"][:-1]))
            lines.append(
                f"  {where}: unknown key; allowed here: {', '.join(allowed)}.{nearest(str(item['loc'][-1]), allowed)}"
            )
        elif item["type"] == "missing":
            lines.append(f"  {where}: is required and missing.")
        else:
            message = TYPES.get(item["type"]) or item["msg"].removeprefix("Value error, ")
            given = _given(item.get("input"))
            refused.setdefault((where, given), []).append(message)
    return lines + [
        f"  {where}: {', or '.join(why)}{given}" for (where, given), why in refused.items()
    ]


def _given(value: object) -> str:
    """As it stands in the recipe. Whole sections and lists are too long to be told."""
    if isinstance(value, dict | list | tuple):
        return ""
    if isinstance(value, bool | str):
        return f" (given: {json.dumps(value, ensure_ascii=False)})"
    return f" (given: {value})"


def _path(location: tuple[int | str, ...]) -> list[str]:
    """Without the name that pydantic gives to one type of several that a setting may have (`constrained-float`, `literal['full']`, `int`)."""
    path = [str(part) for part in location]
    if len(path) < 2 or path[-2] in ("pools", "options"):
        return path
    odd = not path[-1].isidentifier() and not path[-1].isdecimal()
    return path[:-1] if odd or path[-1] in ("int", "float", "str", "bool") else path


def _allowed_at(location: tuple[int | str, ...]) -> list[str]:
    """Field names of the section at `location`; pool and task names are stepped over."""
    section: type[BaseModel] = Recipe
    for part in location:
        if part in section.model_fields:
            annotation = section.model_fields[str(part)].annotation
            if part == "pools":
                section = PoolConfig
            elif part == "tasks":
                section = TaskConfig
            elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
                section = annotation
    return [field.alias or name for name, field in section.model_fields.items()]


def package_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file that ships inside the package (profiles, plan data). It is ours, so a mistake in it is a crash."""
    return tomllib.loads(path.read_text(encoding="utf-8"))
