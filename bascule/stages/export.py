"""`bascule export`: a finished run as a Hugging Face folder that other engines load, held against transformers; GGUF if asked for."""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from bascule import draws
from bascule.config.load import read_resolved
from bascule.data import gguf_tokenizer
from bascule.data.text_tokenizer import open_tokenizer
from bascule.data.tokenizer import Tokenizer
from bascule.errors import CheckFailed, UsageError
from bascule.folder import RunFolder, write_atomic, write_json_atomic
from bascule.infer.reference import MARGIN, Reference
from bascule.ledger import read_ledger
from bascule.model import count, gguf_write, hf_config
from bascule.model.transformer import Transformer
from bascule.model.weights import fingerprint, load_hf, save_hf
from bascule.report.card import card
from bascule.stages.answer import Answer

PROBE_TOKENS = 96


def main(arguments: Namespace) -> Answer:
    """Exit 3 when transformers reads the folder and says something else than we do."""
    folder = RunFolder(Path(arguments.run))
    read_resolved(folder.recipe)  # refuses a folder that is no run
    target = Path(arguments.to) if arguments.to else folder.root / "export"
    data = export(folder, target)
    lines = [
        f"{target}: {data['family']}, {data['parameters']:,} parameters, SHA-256 {data['weights_sha256'][:16]}…, read back and equal."
    ]
    if arguments.gguf:
        data["gguf"] = str(write_gguf(target, folder.root.name))
        lines.append(f"{data['gguf']}: the same weights for llama.cpp, fp32.")
    data["transformers"] = parity = check(target)
    lines.append(told(parity))
    return Answer(
        "\n".join(lines), data, 0 if parity["agrees"] is not False else CheckFailed.exit_code
    )


def export(folder: RunFolder, target: Path) -> dict[str, Any]:
    """Write `target`. The head is written as a tensor of its own for DeepSeek's family: vLLM and SGLang know it no other way.

    Raises UsageError when the run has no model, ModelFolderError when no family covers it or the disk gave back other bytes.
    """
    if not (folder.model / "config.json").exists():
        raise UsageError(
            f"The run {folder.root} has no model yet. Finish it first: bascule run with its recipe."
        )
    if target.resolve() == folder.model.resolve():
        raise UsageError(f"'{target}' is the run's own model folder. Give another with --to.")
    model, config = load_hf(folder.model)
    tokenizer = open_tokenizer(folder.model)
    family = hf_config.family(config)
    save_hf(model, config, target, special_ids=_special(tokenizer), untied=family == "deepseek_v3")
    tokenizer.save(target)
    write_json_atomic(target / "generation_config.json", _generation(tokenizer))
    sha256, written = fingerprint(model), fingerprint(load_hf(target)[0])
    if sha256 != written:
        raise CheckFailed(
            f"'{target}' was written and reads back as other weights ({written[:16]}… instead of {sha256[:16]}…). Check the disk and export again."
        )
    parameters = count.parameters(config, mtp=True)
    text = card(
        read_ledger(folder.ledger), name=folder.root.name, family=family, parameters=parameters
    )
    write_atomic(target / "README.md", lambda path: _write_text(path, text))
    return {
        "folder": str(target),
        "family": family,
        "parameters": parameters,
        "weights_sha256": sha256,
    }


def write_gguf(target: Path, name: str) -> Path:
    model, config = load_hf(target)
    path = target / f"{name}.gguf"
    tokenizer = open_tokenizer(target)
    write_atomic(
        path,
        lambda part: gguf_write.write(
            part,
            model,
            config,
            lambda writer: gguf_tokenizer.add(writer, tokenizer, config.vocab_size),
            name=name,
        ),
    )
    return path


def check(target: Path) -> dict[str, Any]:
    """Let transformers read the folder and compare every log-probability of a fixed text. `agrees` is None where transformers
    is not installed: nothing was compared then."""
    if importlib.util.find_spec("transformers") is None:
        return {"agrees": None}
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]

    reference = Reference(load_hf(target)[0])
    text = probe(reference.model)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)(
            torch.tensor([text])
        )
    logprobs_TV = torch.log_softmax(theirs.logits[0].double(), dim=-1)
    worst = float((logprobs_TV - reference.opinion(text).logprobs_TV).abs().max())
    bound = MARGIN * reference.floor(text)
    return {
        "agrees": worst <= bound,
        "worst_logprob_difference": worst,
        "bound": bound,
        "tokens": len(text),
    }


def probe(model: Transformer) -> list[int]:
    """A text of every kind of token, as long as the model allows up to PROBE_TOKENS: positions matter as much as tokens."""
    length = min(PROBE_TOKENS, model.config.max_position_embeddings)
    numbers = draws.uniform(draws.key(0, "export/probe"), (length,))
    return [int(number * model.config.vocab_size) for number in numbers]


def told(parity: dict[str, Any]) -> str:
    if parity["agrees"] is None:
        return "transformers is not installed: the folder was read back by bascule only."
    word = "agrees" if parity["agrees"] else "DOES NOT agree"
    return (
        f"transformers' AutoModelForCausalLM {word}: largest difference of a log-probability {parity['worst_logprob_difference']:.1e} over "
        f"{parity['tokens']} positions and the whole vocabulary, {parity['bound']:.1e} allowed ({MARGIN:g} times the rounding measured there)."
    )


def _special(tokenizer: Tokenizer) -> dict[str, int]:
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }


def _generation(tokenizer: Tokenizer) -> dict[str, Any]:
    """Temperature 1 without cuts is what the model was trained and evaluated at."""
    return {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, **_special(tokenizer)}


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
