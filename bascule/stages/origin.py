"""What a run starts from: the existing model its recipe names, with its shape and its tokenizer. No torch."""

from __future__ import annotations

import shutil
from pathlib import Path

from bascule.config import ModelConfig, Recipe
from bascule.data import gguf_tokenizer
from bascule.data.text_tokenizer import open_tokenizer
from bascule.errors import RecipeError
from bascule.folder import RunFolder
from bascule.ledger import Ledger, last
from bascule.model import origin
from bascule.records import ModelOrigin
from bascule.stages.answer import say

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def resolve(recipe: Recipe) -> Recipe:
    """The recipe with the sizes of the model found at `model.from`, so that plan, qualify and train all see the real one.

    Raises RecipeError for a size written in the recipe that the model does not have; only `max_position_embeddings` may be
    lowered. Raises ModelFolderError for what cannot be read.
    """
    if recipe.model.from_ is None:
        return recipe
    path = Path(recipe.model.from_).absolute()
    found = origin.shape(path)
    _refuse_other_sizes(recipe.model, found)
    kept = {"from_": str(path)}
    positions = recipe.model.max_position_embeddings
    if "max_position_embeddings" in recipe.model.model_fields_set:
        kept["max_position_embeddings"] = positions  # type: ignore[assignment]
    return recipe.model_copy(update={"model": found.model_copy(update=kept)})


def _refuse_other_sizes(asked: ModelConfig, found: ModelConfig) -> None:
    for name in sorted(asked.model_fields_set - {"from_", "preset"}):
        wanted, real = getattr(asked, name), getattr(found, name)
        if wanted != real and not (name == "max_position_embeddings" and wanted < real):
            raise RecipeError(
                f"model.{name} = {wanted} was asked, the model at '{asked.from_}' has {real}. Leave the key out; only "
                "max_position_embeddings may be set, to a smaller number."
            )


def prepare(recipe: Recipe, folder: RunFolder, ledger: Ledger) -> None:
    """Put the model's tokenizer into the run folder and its SHA-256 into the ledger, once."""
    if recipe.model.from_ is None or last(ledger.read(), ModelOrigin):
        return
    path = Path(recipe.model.from_)
    if origin.format_of(path) == "gguf":
        gguf_tokenizer.load(path).save(folder.tokenizer)
    else:
        copy_tokenizer(path, folder.tokenizer)
    found = origin.describe(path)
    ledger.append(found)
    say(
        f"start from {path}: {found.family}, {found.parameters:,} parameters, SHA-256 {found.sha256[:12]}…"
    )


def copy_tokenizer(source: Path, target: Path) -> None:
    """Raises UsageError when `source` has no tokenizer that bascule reads."""
    open_tokenizer(source)
    target.mkdir(parents=True, exist_ok=True)
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
