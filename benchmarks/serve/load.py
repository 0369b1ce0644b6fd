"""Many streaming clients against a running server: nothing lost, nothing mixed up, memory flat.

    bascule serve out/demo --port 8000 &
    python benchmarks/serve/load.py --url http://127.0.0.1:8000 --clients 500 --seconds 300

Every client asks questions one after the other, each with a seed of its own, and reads its stream to the end. Answers to equal
(question, seed) must be equal, whoever asked and whenever: a stream that was mixed up, cut or answered from another's cache
shows. Every 20th client behaves badly: it hangs up in the middle, sends garbage, or sends a body far too large.

With --rate R requests come at R a second on average, at random moments, however many are still running: the latencies at that load.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

QUESTIONS = 97  # different (question, seed) pairs, so that most are asked many times


@dataclass
class Tally:
    first_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)
    tokens: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    answers: dict[int, str] = field(default_factory=dict)
    mixed: int = 0
    memory_mib: list[int] = field(default_factory=list)


async def request(
    host: str, port: int, body: bytes
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection(host, port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode() + body)
    return reader, writer


async def ask(host: str, port: int, model: str, number: int, tally: Tally) -> None:
    a, b, c = number % 10, number // 10 % 10, number % 7
    body = {
        "model": model,
        "messages": [{"role": "user", "content": f"{a}+{b}-{c}=?"}],
        "seed": number,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start = time.monotonic()
    reader, writer = await request(host, port, json.dumps(body).encode())
    status = (await reader.readline()).split()[1].decode()
    text, first, ended = "", 0.0, False
    while line := await reader.readline():
        if line.startswith(b"data: [DONE]"):
            ended = True
        elif line.startswith(b"data: "):
            event = json.loads(line[6:])
            if event.get("usage"):
                tally.tokens += event["usage"]["completion_tokens"]
            for choice in event.get("choices", []):
                said = (choice["delta"].get("reasoning") or "") + (
                    choice["delta"].get("content") or ""
                )
                first = first or (time.monotonic() if said else 0.0)
                text += said
    writer.close()
    if status != "200":
        tally.outcomes[status] += 1
        return
    tally.outcomes["whole" if ended else "cut"] += 1
    tally.first_s.append((first or time.monotonic()) - start)
    tally.whole_s.append(time.monotonic() - start)
    if tally.answers.setdefault(number, text) != text:
        tally.mixed += 1


async def misbehave(host: str, port: int, model: str, number: int, tally: Tally) -> None:
    """Hang up in the middle, send garbage, send too much."""
    body = json.dumps(
        {"model": model, "messages": [{"role": "user", "content": "1+1=?"}], "stream": True}
    ).encode()
    if number % 3 == 0:
        reader, writer = await request(host, port, body)
        await reader.readline()
    elif number % 3 == 1:
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(b"\x16\x03\x01 GET garbage \r\n\r\n")
        await reader.read(200)
    else:
        reader, writer = await request(host, port, b" " * (100 << 20))
        await reader.readline()
    writer.close()
    tally.outcomes["misbehaved"] += 1
    await asyncio.sleep(0.2)


async def client(at: int, host: str, port: int, model: str, until: float, tally: Tally) -> None:
    round_ = 0
    while time.monotonic() < until:
        try:
            if at % 20 == 19:
                await misbehave(host, port, model, at + round_, tally)
            else:
                await ask(host, port, model, (at * 31 + round_ * 17) % QUESTIONS, tally)
        except (OSError, asyncio.IncompleteReadError) as error:
            tally.outcomes["misbehaved" if at % 20 == 19 else type(error).__name__] += 1
        round_ += 1


async def at_rate(rate: float, host: str, port: int, model: str, until: float, tally: Tally) -> None:  # fmt: skip
    gaps, asked = random.Random(0), []
    while time.monotonic() < until:
        asked.append(asyncio.create_task(ask(host, port, model, len(asked) * 17 % QUESTIONS, tally)))  # fmt: skip
        await asyncio.sleep(gaps.expovariate(rate))
    await asyncio.gather(*asked)


async def load(options: argparse.Namespace, model: str) -> Tally:
    host, port_ = options.url.removeprefix("http://").split(":")
    port, tally, until = int(port_), Tally(), time.monotonic() + options.seconds
    clients = 0 if options.rate else options.clients
    asking = [client(at, host, port, model, until, tally) for at in range(clients)]
    if options.rate:
        asking = [at_rate(options.rate, host, port, model, until, tally)]
    await asyncio.gather(watch_memory(options.pid, options.seconds, until, tally), *asking)
    return tally


async def watch_memory(pid: int | None, seconds: float, until: float, tally: Tally) -> None:
    """Ten looks, so that growth is told from a cache that fills once."""
    while pid is not None and time.monotonic() < until:
        tally.memory_mib.append(memory_bytes(pid) >> 20)
        await asyncio.sleep(seconds / 10)


def memory_bytes(pid: int | None) -> int:
    """Resident memory of the server and its engine; 0 without --pid."""
    if pid is None:
        return 0
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    pages = sum(
        int(Path(f"/proc/{one}/statm").read_text().split()[1]) for one in (str(pid), *children)
    )
    return pages * 4096


def main() -> int:
    parser = argparse.ArgumentParser(description="Streaming load against a bascule server.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--rate", type=float, help="requests a second, instead of clients")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--pid", type=int, help="of the server, to watch its memory")
    options = parser.parse_args()
    with urllib.request.urlopen(options.url + "/v1/models") as reply:
        model = json.load(reply)["data"][0]["id"]
    before = memory_bytes(options.pid)
    start = time.monotonic()
    tally = asyncio.run(load(options, model))
    seconds = time.monotonic() - start
    quantiles = {
        name: statistics.quantiles(values, n=100) if len(values) > 1 else values * 99
        for name, values in (("first", tally.first_s), ("whole", tally.whole_s))
    }
    print(json.dumps({
        "clients": None if options.rate else options.clients, "rate": options.rate, "seconds": round(seconds, 1), "outcomes": dict(tally.outcomes), "mixed_up": tally.mixed,
        "tokens_per_s": round(tally.tokens / seconds), "answers_per_s": round(tally.outcomes["whole"] / seconds, 1),
        "first_token_s": {"p50": round(quantiles["first"][49], 3), "p99": round(quantiles["first"][98], 3)},
        "answer_s": {"p50": round(quantiles["whole"][49], 3), "p99": round(quantiles["whole"][98], 3)},
        "memory_mib": {"before": before >> 20, "during": tally.memory_mib, "after": memory_bytes(options.pid) >> 20},
    }, indent=1))  # fmt: skip
    bad = {
        kind: count for kind, count in tally.outcomes.items() if kind not in ("whole", "misbehaved")
    }
    if bad or tally.mixed:
        print(f"Not clean: {bad}, mixed up: {tally.mixed}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
