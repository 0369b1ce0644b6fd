"""What MLPerf inference fixes and its result tables therefore do not print: lengths of the data sets, latency limits, drafts.

Mean outputs and limits are those of the logs of inference_results_v5.1 (mlperf_log_summary.txt); the interactive limits of R1 and
gpt-oss, and the three drafts allowed there, are v6.0's rules. Mean inputs are those of the reference data sets, rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

# model: mean tokens in and out, 99th-percentile milliseconds a token in the server and in the interactive scenario
WORKLOADS = {
    "deepseek-r1": (800, 3740, 80.0, 15.0),
    "llama-2-70b": (294, 301, 200.0, 40.0),
    "llama-3.1-8b": (778, 129, 100.0, 30.0),
    "llama-3.1-405b": (9400, 651, 175.0, 80.0),
    "mixtral-8x7b": (340, 144, 200.0, 200.0),
    "gpt-oss-120b": (1024, 1024, 80.0, 20.0),  # lengths not found: assumed
}
DRAFTED = ("deepseek-r1", "gpt-oss-120b")  # interactive runs may draft three tokens
MEAN_OF_LIMIT = (
    0.75  # the mean token time over the 99th percentile that is limited: 0.58 to 0.83 in the logs
)
NODE = 8  # every submission of R1 serves from groups of one node, whatever the system's size


@dataclass(frozen=True)
class Scenario:
    """One scenario of one model. `token_ms`: the mean time a token may take (None: offline, no limit)."""

    prompt: float
    completion: float
    token_ms: float | None
    drafts: str


def scenario(phase: str, model: str) -> Scenario | None:
    """The scenario that a row's phase names (`MLPerf v5.1 offline`) for a model by its plain name; None for anything else."""
    word = phase.lower()
    if "mlperf" not in word:
        return None
    prompt, completion, server, interactive = WORKLOADS.get(model, (1024, 1024, 80.0, 40.0))
    if "interactive" in word:
        return Scenario(
            prompt, completion, MEAN_OF_LIMIT * interactive, "MTP 3" if model in DRAFTED else ""
        )
    return Scenario(prompt, completion, MEAN_OF_LIMIT * server if "server" in word else None, "")
