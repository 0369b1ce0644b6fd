"""What a run starts from: the existing model its recipe names, with its shape and its tokenizer. No torch."""

from __future__ import annotations

import shutil
from pathlib import Path

from bascule.config.model import ModelConfig
from bascule.config.recipe import Recipe
from bascule.data import gguf_tokenizer
from bascule.data.shards import SPLITS, Shards
from bascule.data.tasks import jsonl
from bascule.data.text_tokenizer import TextTokenizer, open_tokenizer
from bascule.data.tokenizer import Tokenizer
from bascule.errors import RecipeError, UsageError
from bascule.folder import RunFolder
from bascule.ledger import Ledger, last
from bascule.model import origin
from bascule.records import DialTurned, ModelOrigin, TextOpened
from bascule.stages import dial
from bascule.stages.answer import say

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def resolve(recipe: Recipe) -> Recipe:
    """`resolve_and_derive` for who asks for the recipe alone."""
    return resolve_and_derive(recipe)[0]


def resolve_and_derive(recipe: Recipe) -> tuple[Recipe, DialTurned | None]:
    """The recipe with the sizes of the model found at `model.from`, so that plan, qualify and train all see the real one; or with
    what its dial gives, which is told to people, and what that was.

    Raises RecipeError for a size written in the recipe that the model does not have; only `max_position_embeddings` may be
    lowered. Raises ModelFolderError for what cannot be read.
    """
    if "pretrain" in recipe.train.phases:
        recipe = _with_text(recipe)
    if recipe.sft.data:  # a resume may be typed in another folder
        absolute = {"data": str(Path(recipe.sft.data).absolute())}
        recipe = recipe.model_copy(update={"sft": recipe.sft.model_copy(update=absolute)})
    tasks = tuple(
        one.model_copy(update={"name": jsonl.absolute(one.name)}) for one in recipe.data.tasks
    )
    if tasks != recipe.data.tasks:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"tasks": tasks})})
    if recipe.model.from_ is None:
        if recipe.model.depth is None and recipe.model.preset == "custom":
            return recipe, None
        recipe, turned = dial.turn(recipe, tokenizer(recipe).vocab_size)
        for line in dial.lines(turned):
            say(line)
        return recipe, turned
    path = Path(recipe.model.from_).absolute()
    found = origin.shape(path)
    _refuse_other_sizes(recipe.model, found)
    kept = {"from_": str(path)}
    positions = recipe.model.max_position_embeddings
    if "max_position_embeddings" in recipe.model.model_fields_set:
        kept["max_position_embeddings"] = positions  # type: ignore[assignment]
    return recipe.model_copy(update={"model": found.model_copy(update=kept)}), None


def _with_text(recipe: Recipe) -> Recipe:
    """The recipe with the absolute path of its shards, and their vocabulary's size."""
    folder = Path(str(recipe.pretrain.data)).absolute()
    size = Shards.open(folder).index["vocab_size"]
    pretrain = recipe.pretrain.model_copy(update={"data": str(folder)})
    model = recipe.model
    if pretrain.sequence_length > model.max_position_embeddings and not model.from_:
        raise RecipeError(
            f"pretrain.sequence_length = {pretrain.sequence_length} exceeds model.max_position_embeddings = "
            f"{model.max_position_embeddings}. Shorten the windows or raise the model's length."
        )
    if not model.from_:
        model = model.model_copy(update={"vocab_size": size})
    return recipe.model_copy(update={"pretrain": pretrain, "model": model})


def _refuse_other_sizes(asked: ModelConfig, found: ModelConfig) -> None:
    for name in sorted(asked.model_fields_set - {"from_", "preset"}):
        wanted, real = getattr(asked, name), getattr(found, name)
        if wanted != real and not (name == "max_position_embeddings" and wanted < real):
            raise RecipeError(
                f"model.{name} = {wanted} was asked, the model at '{asked.from_}' has {real}. Leave the key out; only "
                "max_position_embeddings may be set, to a smaller number."
            )


def prepare(recipe: Recipe, folder: RunFolder, ledger: Ledger) -> None:
    """Put the tokenizer into the run folder and the SHA-256 of model and text into the ledger; on resume compare them."""
    if recipe.model.from_ and not last(ledger.read(), ModelOrigin):
        _prepare_model(Path(recipe.model.from_), folder, ledger)
    if "pretrain" in recipe.train.phases:
        _prepare_text(recipe, folder, ledger)


def _prepare_text(recipe: Recipe, folder: RunFolder, ledger: Ledger) -> None:
    path = Path(str(recipe.pretrain.data))
    shards = Shards.open(path)
    began = last(ledger.read(), TextOpened)
    if began and began.sha256 != shards.digest():
        raise UsageError(
            f"pretrain.data = '{path}' is not the text this run began with (index SHA-256 {began.sha256[:12]}…). Put the old "
            "shards back, or begin another run with --name."
        )
    shards.verify()
    if not (folder.tokenizer / "tokenizer.json").exists():
        copy_tokenizer(path, folder.tokenizer)
    ours = open_tokenizer(folder.tokenizer)
    if not isinstance(ours, TextTokenizer) or ours.digest() != shards.index["tokenizer_sha256"]:
        raise RecipeError(
            f"The text in '{path}' was tokenised with another tokenizer than the model's. Tokenise it again with "
            "bascule tokenize --tokenizer and the path of model.from."
        )
    if began is None:
        parts = {split: sum(one["tokens"] for one in shards.index[split]) for split in SPLITS}
        ledger.append(
            TextOpened(
                path=str(path), sha256=shards.digest(), vocab_size=shards.index["vocab_size"],
                train_tokens=parts["train"], heldout_tokens=parts["heldout"],
            )
        )  # fmt: skip
        say(
            f"text: {parts['train']:,} tokens to train on, {parts['heldout']:,} held out, all hashes agree"
        )
        say(_rounds(recipe, parts["train"]))


def _rounds(recipe: Recipe, tokens: int) -> str:
    pretrain = recipe.pretrain
    read = recipe.phase_steps()["pretrain"] * pretrain.batch_sequences * pretrain.sequence_length
    rounds = read / max(1, tokens)
    much = "; past four times, text teaches less and less (arXiv 2305.16264)" if rounds > 4 else ""
    return f"text: {read:,} tokens will be read, all of it {rounds:.1f} times{much}"


def _prepare_model(path: Path, folder: RunFolder, ledger: Ledger) -> None:
    if origin.format_of(path) == "gguf":
        gguf_tokenizer.load(path).save(folder.tokenizer)
    else:
        copy_tokenizer(path, folder.tokenizer)
    found = origin.describe(path)
    ledger.append(found)
    say(
        f"start from {path}: {found.family}, {found.parameters:,} parameters, SHA-256 {found.sha256[:12]}…"
    )


def tokenizer(recipe: Recipe) -> Tokenizer:
    """The tokenizer that a resolved recipe learns with: the existing model's, the text's, or bascule's own."""
    if recipe.model.from_:
        path = Path(recipe.model.from_)
        return (
            gguf_tokenizer.load(path) if origin.format_of(path) == "gguf" else open_tokenizer(path)
        )
    if "pretrain" in recipe.train.phases:
        return open_tokenizer(Path(str(recipe.pretrain.data)))
    return Tokenizer()


def copy_tokenizer(source: Path, target: Path) -> None:
    """Raises UsageError when `source` has no tokenizer that bascule reads."""
    open_tokenizer(source)
    target.mkdir(parents=True, exist_ok=True)
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
