"""An incident on disk: all that is needed to replay it elsewhere, without the run, the data or the supervisor.

    incidents/0001-step-312/
      incident.json         the record, the sentinel's words, the replays, the wrong operators, the circumstances
      model.safetensors     weights and buffers before the step
      batch.safetensors     the step's input
      gradients.safetensors `first/...` as the chip first computed them, `<where>/...` one set for each replay
      product.safetensors   the first wrong matrix product: left, right, output (only where one was caught)

Weights and gradients are many bytes: `make_room` drops those of the oldest incidents where all take more than the recipe allows, and
`incident.json` says so (`dropped`). The story, the batch and the product stay.

`replay_product` needs no model: it multiplies the recorded matrices again on any accelerator. That is the reproducer to send
to a vendor. `bascule replay` does both through `replay_incident`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bascule import numerics
from bascule.accelerators.base import Accelerator, Work
from bascule.errors import SnapshotError
from bascule.folder import write_atomic, write_json_atomic
from bascule.guard import spot
from bascule.guard.checksum import Product, product_ratio
from bascule.tensors import save_tensors

HEAVY = ("model.safetensors", "gradients.safetensors")


@dataclass(frozen=True)
class Case:
    """A recorded step, read back: hand `batch` and `model` to a stepper of the same recipe to recompute it."""

    folder: Path
    told: dict[str, Any]
    model: dict[str, Tensor]
    batch: dict[str, Tensor]
    gradients: dict[str, dict[str, Tensor]]

    @property
    def step(self) -> int:
        return int(self.told["step"])

    @property
    def phase(self) -> str:
        return str(self.told["phase"])


@dataclass(frozen=True)
class ReplayReport:
    """What an accelerator makes of a recorded incident. `errors`: gradient set -> largest scale-free error of any tensor
    against this replay, and which tensor. `product_ratio`: the recorded product, multiplied here, over its checksum bound."""

    accelerator: str
    errors: dict[str, tuple[float, str]]
    product_ratio: float | None
    product_error: float | None


def new_id(incidents: Path, step: int) -> str:
    """The next free number, so that ids sort by time over all launches of the run."""
    taken = [
        int(found.group(1))
        for path in incidents.glob("*")
        if (found := re.match(r"(\d{4})-", path.name))
    ]
    return f"{max(taken, default=0) + 1:04d}-step-{step}"


def write(
    folder: Path,
    told: Mapping[str, Any],
    *,
    model: Mapping[str, Tensor],
    batch: Mapping[str, Tensor],
    gradients: Mapping[str, Mapping[str, Tensor]],
    product: Product | None = None,
) -> Path:
    """Write everything; `incident.json` last, so that a folder with it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder / "model.safetensors", model)
    _save(folder / "batch.safetensors", batch)
    _save(
        folder / "gradients.safetensors",
        {
            f"{where}/{name}": grad
            for where, grads in gradients.items()
            for name, grad in grads.items()
        },
    )
    if product is not None:
        tensors = {"left": product.left, "right": product.right, "output": product.output}
        if product.addend is not None:
            tensors["addend"] = product.addend
        _save(folder / "product.safetensors", tensors)
    write_json_atomic(folder / "incident.json", dict(told))
    return folder


def make_room(incidents: Path, most_bytes: float) -> list[Path]:
    """Drop weights and gradients of the oldest incidents until all incidents fit into `most_bytes`; the newest is never touched.
    Returns the folders that lost theirs."""
    folders = sorted(path.parent for path in incidents.glob("*/incident.json"))
    taken = {folder: sum(file.stat().st_size for file in folder.iterdir()) for folder in folders}
    dropped: list[Path] = []
    for folder in folders[:-1]:
        if sum(taken.values()) <= most_bytes:
            break
        heavy = [folder / name for name in HEAVY if (folder / name).exists()]
        if not heavy:
            continue
        told = json.loads((folder / "incident.json").read_text(encoding="utf-8"))
        write_json_atomic(
            folder / "incident.json", {**told, "dropped": [file.name for file in heavy]}
        )
        for file in heavy:
            taken[folder] -= file.stat().st_size
            file.unlink()
        dropped.append(folder)
    return dropped


def read(folder: Path) -> Case:
    """Raises SnapshotError when the folder is no incident, is damaged, or lost its weights to make room."""
    try:
        told = json.loads((folder / "incident.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise SnapshotError(
            f"'{folder}' is not an incident ({error}). Give a folder under out/NAME/incidents/."
        ) from None
    if told.get("dropped"):
        raise SnapshotError(
            f"'{folder}' has no weights and gradients any more: guard.incidents_gib left room for newer incidents only. Its batch, its "
            "story and, where one was caught, its wrong product are still there."
        )
    gradients: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _load(folder / "gradients.safetensors").items():
        where, _, parameter = name.partition("/")
        gradients.setdefault(where, {})[parameter] = tensor
    return Case(
        folder,
        told,
        _load(folder / "model.safetensors"),
        _load(folder / "batch.safetensors"),
        gradients,
    )


def replay_product(folder: Path, accelerator: Accelerator) -> tuple[float, float] | None:
    """(checksum error over its bound, scale-free error against fp64) of the recorded product, multiplied on `accelerator`.

    None when the incident recorded no product.
    """
    path = folder / "product.safetensors"
    if not path.exists():
        return None
    found = _load(path)
    with accelerator.session(Work("train", step=_step(folder), attempt=1)), torch.no_grad():
        output = accelerator.to_device(found["left"]) @ accelerator.to_device(found["right"])
        accelerator.synchronize()
    here = output.cpu()
    right = found["left"].double() @ found["right"].double()
    ratio = float(product_ratio(found["left"], found["right"], here))
    taken = spot.sample(found["left"], found["right"], here)
    if taken is not None:
        ratio = max(ratio, spot.ratio_of_one(spot.squares(taken)))
    return ratio, numerics.scale_free_error(here, right)


def replay_incident(
    folder: Path,
    accelerator: Accelerator,
    recompute: Callable[[Case, Accelerator], Mapping[str, Tensor]] | None = None,
) -> ReplayReport:
    """Compute a recorded incident again on `accelerator` and hold it against what was recorded.

    `recompute` (from a stage, which may build the model) returns the step's gradients; without it only the product is replayed.
    """
    errors: dict[str, tuple[float, str]] = {}
    if recompute is not None:
        case = read(folder)
        here = recompute(case, accelerator)
        errors = {where: largest_error(grads, here) for where, grads in case.gradients.items()}
    product = replay_product(folder, accelerator)
    return ReplayReport(
        accelerator.name,
        errors,
        None if product is None else product[0],
        None if product is None else product[1],
    )


def largest_error(
    measured: Mapping[str, Tensor], reference: Mapping[str, Tensor]
) -> tuple[float, str]:
    """(largest scale-free error of any tensor, its name). Tensors that are equal bit for bit cost one comparison."""
    worst = (0.0, "")
    for name, tensor in measured.items():
        other = reference[name]
        if tensor.device == other.device and torch.equal(tensor, other):
            continue
        error = numerics.scale_free_error(tensor, other)
        if error > worst[0] or error != error:
            worst = (error, name)
    return worst


def _step(folder: Path) -> int:
    return int(json.loads((folder / "incident.json").read_text(encoding="utf-8"))["step"])


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """safetensors refuses tensors that share memory (tied weights): each is written as its own copy."""
    plain = {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()
    }
    write_atomic(path, lambda temporary: save_tensors(plain, temporary))


def _load(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise SnapshotError(
            f"'{path}' cannot be read ({error}). The incident is damaged; use another one."
        ) from None
