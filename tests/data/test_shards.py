"""Text in shards: nothing lost, nothing held out is trained on, damage is seen, and the order depends on seed and step alone."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bascule import cli
from bascule.config.load import load_recipe
from bascule.data import chat, corpus, documents
from bascule.data.shards import Order, Shards
from bascule.data.text_tokenizer import TextTokenizer, open_tokenizer
from bascule.errors import UsageError
from bascule.stages import tokenize

TEXTS = [
    f"document {n}: " + "the cat sat on the mat, 12345 times. häß\n" * (n % 5 + 1)
    for n in range(40)
]


def arguments(files: list[Path], out: Path, **changes: object) -> Namespace:
    given = {
        "tokenizer": None,
        "vocab_size": 300,
        "text_field": "text",
        "traces": None,
        "held_out": 0.1,
        "shard_tokens": 400,
    }
    return Namespace(files=[str(one) for one in files], out=str(out), **{**given, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("text")
    lines = [json.dumps({"text": text}) for text in [*TEXTS, TEXTS[3]]]
    (root / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    answer = tokenize.main(arguments([root / "a.jsonl"], root / "shards"))
    assert answer.data["copies_left_out"] == 1
    return root / "shards"


def decoded(folder: Path, split: str) -> list[str]:
    text, tokenizer = Shards.open(folder).text(split), open_tokenizer(folder)
    ends = text.document_ends.tolist()
    starts = [0, *ends[:-1]]
    return [
        tokenizer.decode(text.tokens(a, b - a).tolist()) for a, b in zip(starts, ends, strict=True)
    ]


def test_every_document_comes_back_once_and_on_one_side(folder: Path) -> None:
    train, heldout = decoded(folder, "train"), decoded(folder, "heldout")
    assert len(Shards.open(folder).index["train"]) > 1  # several shards
    assert heldout and sorted(train + heldout) == sorted(TEXTS)


def test_the_bytes_that_tokens_stand_for_are_the_texts_bytes(folder: Path) -> None:
    shards = Shards.open(folder)
    text = shards.text("train")
    counted = int(shards.token_bytes()[text.tokens(0, len(text))].sum())
    assert counted == sum(len(one.encode()) for one in decoded(folder, "train"))


def test_digits_are_split_and_tags_are_one_token_each(folder: Path) -> None:
    tokenizer = open_tokenizer(folder)
    assert isinstance(tokenizer, TextTokenizer)
    ids = tokenizer.encode("<think>2026</think>")
    assert len(ids) == 6 and ids[0] == tokenizer.think_open_id
    assert tokenizer.decode(ids) == "<think>2026</think>"


def test_a_tokenizer_just_trained_reads_a_thought_as_it_does_after_it_was_saved() -> None:
    tokenizer = documents.train_tokenizer(TEXTS, 300)
    [ids] = tokenizer.encode_many(["<think>1</think>2<eos>"])
    assert [tokenizer.think_open_id, tokenizer.think_close_id] == [ids[0], ids[2]]
    assert tokenizer.eos_id not in ids and tokenizer.decode(ids) == "<think>1</think>2<eos>"


def test_a_document_cannot_end_itself(folder: Path) -> None:
    tokenizer = open_tokenizer(folder)
    assert isinstance(tokenizer, TextTokenizer)
    assert tokenizer.eos_id in tokenizer.encode("<eos>")
    assert tokenizer.eos_id not in tokenizer.encode_many(["a<eos>b"])[0]


def test_transformers_gives_the_same_ids(folder: Path) -> None:
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(folder), open_tokenizer(folder)
    assert theirs.encode("the 123 häß cat", add_special_tokens=False) == ours.encode(
        "the 123 häß cat"
    )
    messages = [{"role": "user", "content": "1+2=?"}]
    rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == ours.render(messages)


def test_a_damaged_shard_is_named(folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    Shards.open(copy).verify()
    path = copy / "train-00001.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 4
    path.write_bytes(bytes(data))
    with pytest.raises(UsageError, match=r"train-00001\.npy"):
        Shards.open(copy).verify()


def test_a_finished_folder_is_not_overwritten(folder: Path) -> None:
    with pytest.raises(UsageError, match="already holds shards"):
        tokenize.main(arguments([folder.parent / "a.jsonl"], folder))


def test_a_given_tokenizer_gives_the_same_tokens(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    tokenize.main(arguments([folder.parent / "a.jsonl"], out, tokenizer=str(folder)))
    assert Shards.open(out).index == Shards.open(folder).index
    file = str(folder / "tokenizer.json")
    tokenize.main(arguments([folder.parent / "a.jsonl"], tmp_path / "third", tokenizer=file))
    assert Shards.open(tmp_path / "third").index == Shards.open(folder).index


def test_parquet_gives_what_json_lines_give(folder: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra parquet)")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet")
    found = list(documents.read([tmp_path / "a.parquet"], "text", lambda *_: None))
    assert found == TEXTS
    with pytest.raises(UsageError, match="columns: text"):
        list(documents.read([tmp_path / "a.parquet"], "body", lambda *_: None))


def test_what_datasets_saved_to_disk_gives_what_json_lines_give(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra parquet)")
    table = pyarrow.table({"id": list(range(len(TEXTS))), "text": TEXTS})
    with pyarrow.OSFile(str(tmp_path / "data-00000-of-00001.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:  # fmt: skip
        stream.write_table(table)
    (tmp_path / "state.json").write_text("{}")  # what else lies in such a folder is no text
    found = list(
        documents.read(documents.files([tmp_path], lambda _: None), "text", lambda *_: None)
    )
    assert found == [text for text in TEXTS if text.strip()]
    with pytest.raises(UsageError, match="no column 'body'; columns: id, text"):
        list(documents.read(documents.files([tmp_path], lambda _: None), "body", lambda *_: None))


def test_what_a_folder_holds_beside_text_is_told_and_endings_may_be_large(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "A.TXT").write_text("one\n", encoding="utf-8-sig")
    (tmp_path / "b.JSONL").write_text('{"text": "two"}\n')
    (tmp_path / "c.csv").write_text("three\n")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden\n")
    other: list[Path] = []
    found = documents.files([tmp_path], other.append)
    assert list(documents.read(found, "text", lambda *_: None)) == ["one\n", "two"]
    assert other == [tmp_path / "c.csv"]
    tokenize.main(arguments([tmp_path], tmp_path / "out", vocab_size=300))
    assert "left out: 1 files of other kinds (.csv), for instance" in capsys.readouterr().err


def test_half_a_surrogate_pair_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": "\\ud800"}\n')
    with pytest.raises(UsageError, match=r"line 2: 'text' holds half of a surrogate pair"):
        list(documents.read([tmp_path / "bad.jsonl"], "text", lambda *_: None))


def test_a_line_without_text_and_a_file_that_is_not_utf8_are_told(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    with pytest.raises(UsageError, match=r"bad\.jsonl', line 2"):
        list(documents.read([tmp_path / "bad.jsonl"], "text", lambda *_: None))
    (tmp_path / "latin.txt").write_bytes("häß".encode("latin-1"))
    told: list[Path] = []
    assert not list(
        documents.read([tmp_path / "latin.txt"], "text", lambda path, why: told.append(path))
    )
    assert told == [tmp_path / "latin.txt"]


def test_damaged_tables_and_lines_are_named_not_crashed_on(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra parquet)")
    from pyarrow import parquet

    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "numbers.parquet")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    for name, why in (("torn.parquet", "cannot be read"), ("numbers.parquet", "int64, not text"), ("latin.jsonl", "line 1")):  # fmt: skip
        with pytest.raises(UsageError, match=why):
            list(documents.read([tmp_path / name], "text", lambda *_: None))


def test_blank_documents_are_left_out_and_counted(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in ("one two", " ", "", "three four", "one two")]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    data = tokenize.main(arguments([tmp_path / "a.jsonl"], tmp_path / "out")).data
    assert data["documents"] == 3 and data["copies_left_out"] == 1 and data["blank_left_out"] == 2


@settings(deadline=None, max_examples=30)
@given(
    st.integers(50, 2000),
    st.integers(2, 24),
    st.integers(0, 5),
    st.sampled_from([1, 2, 3, 4, 6, 12]),
)
def test_any_number_of_ranks_reads_together_what_one_reads(
    tokens: int, length: int, seed: int, ranks: int
) -> None:
    if (tokens - 1) // length - 1 < 1:
        return
    whole = Order(tokens, length, seed)
    for index in (0, 7, 31):
        together = [
            start
            for rank in range(ranks)
            for start in Order(tokens, length, seed).share(index, 12, rank=rank, ranks=ranks)
        ]
        assert together == whole.share(index, 12)
        assert all(start >= 0 and start + length + 1 <= tokens for start in together)


def test_an_epoch_reads_every_window_once_and_the_next_cuts_elsewhere() -> None:
    order = Order(1001, 10, 3)
    first, second = order.starts(0, order.windows), order.starts(order.windows, order.windows)
    assert len(set(first)) == len(set(second)) == order.windows
    assert np.all(np.diff(np.sort(first)) == 10)
    assert first != second and {one % 10 for one in first} != {one % 10 for one in second}


RECIPE = """
pools.here.accelerator = "cpu"
data = { train_problems = 60, eval_problems = 8, tasks = [{ name = "NAME" }] }
"""


def test_worked_solutions_are_documents_and_no_held_out_problem_is_among_them(
    tmp_path: Path,
) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE.replace("NAME", "chain_sum"), encoding="utf-8")
    answer = tokenize.main(arguments([], tmp_path / "shards", traces=str(recipe)))
    assert answer.data["traces"] == answer.data["train_documents"] + answer.data["heldout_documents"] == 60  # fmt: skip
    shards = Shards.open(tmp_path / "shards")
    tokenizer = open_tokenizer(tmp_path / "shards")
    texts = [tokenizer.decode(ids) for split in ("train", "heldout") for ids in split_up(shards, split)]  # fmt: skip
    heldout = corpus.heldout_problems(load_recipe(recipe, []).data)
    assert not {text.split("\n")[0] for text in texts} & {one.question for one in heldout}
    think = tokenizer.encode("<think>")
    assert len(think) == 1
    for text in texts:
        question, trace = text.split("\n")
        assert question.endswith("=?") and chat.parse_strict(trace)
    assert all(think[0] in ids for ids in split_up(shards, "train"))


def split_up(shards: Shards, split: str) -> list[list[int]]:
    """The tokens of every document, without its borders."""
    text = shards.text(split)
    ends = [0, *text.document_ends.tolist()]
    return [text.tokens(a + 1, b - a - 2).tolist() for a, b in zip(ends, ends[1:], strict=False)]


def test_a_recipe_without_solvers_and_nothing_at_all_are_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE.replace("NAME", "gym:spell_backward"), encoding="utf-8")
    with pytest.raises(UsageError, match="none of its .* has a worked solution"):
        tokenize.main(arguments([], tmp_path / "shards", traces=str(recipe)))
    with pytest.raises(UsageError, match="needs something to read"):
        tokenize.main(arguments([], tmp_path / "shards"))


@pytest.mark.parametrize(
    "word", ["--held-out=5", "--held-out=-1", "--held-out=nan", "--shard-tokens=0"]
)
def test_numbers_that_would_leave_nothing_to_train_on_are_refused(
    word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["tokenize", str(tmp_path), "--out", str(tmp_path / "shards"), word]) == 2
    assert word.split("=")[0] in capsys.readouterr().err


def test_too_little_text_says_so() -> None:
    with pytest.raises(UsageError, match="need at least 201"):
        Order(150, 100, 0)
