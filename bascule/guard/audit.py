"""A piece of the real step, computed again on another kind of chip: what the chip made of real activations and gradients.

Each audited step captures one part of the model (the embedding, a block, the last norm; they take turns): its inputs, its
output, the gradient that came back into it and the gradients it made. The referee recomputes the part from the same inputs and
weights. Equal bits end the question. Otherwise the error is held against a measured noise floor: the referee's own response to
inputs moved by one unit in the last place, per tensor (DESIGN section 7), never a fixed tolerance.

Capturing changes no bit of the step: tensors are read through hooks, never wrapped (an alias would change the order in which
autograd adds gradients, and an audited step would not equal its own replay).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bascule import draws, numerics
from bascule.accelerators.base import Accelerator, Work
from bascule.config.training import Precision
from bascule.guard.noise import Measuring
from bascule.model.precision import DTYPE, computing, present, rounded

MEASURING: dict[Precision, Measuring] = {
    "fp32": Measuring(8.0, ((2, 1), (8, 4))),
    "bf16": Measuring(4.0, ((2, 1), (8, 2))),
}
"""By the type in which a part's products are. Error over response that two right chips may show: the response to one ulp at the inputs is about
the error of one rounding per input element; a part rounds some ten times in a row."""


@dataclass(frozen=True)
class Part:
    """A piece of the model that can be recomputed alone. `chained`: its input feeds nothing else, so the gradient that
    arrives at the input is all its own (true for the blocks of a stack)."""

    name: str
    module: nn.Module
    chained: bool


@dataclass
class Capture:
    """What the chip did with one part in one step. Filled by hooks during the step; tensors are CPU copies."""

    step: int
    part: Part
    weights: dict[str, Tensor]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)
    output_grads: dict[int, Tensor] = field(default_factory=dict)
    input_grads: dict[int, Tensor] = field(default_factory=dict)
    calls: int = 0
    precision: Precision = "fp32"


@dataclass(frozen=True)
class Disagreement:
    """A tensor of the part that chip and referee compute differently. `error` and `bound` are relative to its own RMS."""

    tensor: str
    error: float
    bound: float
    reason: str

    def __str__(self) -> str:
        return f"{self.tensor}: {self.reason}"


@dataclass(frozen=True)
class Finding:
    """An audit's answer. `worst` None when chip and referee agree; `bit_equal` when no perturbation had to be measured."""

    part: str
    step: int
    worst: Disagreement | None
    bit_equal: bool
    tensors: int


def parts(model: nn.Module) -> list[Part]:
    """The model cut into pieces: elements of stacks (`nn.ModuleList`) and whatever else owns parameters, in order."""
    found: list[Part] = []
    _cut(model, "", False, found)
    return found


def _cut(module: nn.Module, name: str, in_stack: bool, found: list[Part]) -> None:
    holds_stack = any(
        isinstance(child, nn.ModuleList) for child in module.modules() if child is not module
    )
    if in_stack or (not holds_stack and not isinstance(module, nn.ModuleList)):
        if any(True for _ in module.parameters()):
            found.append(Part(name, module, chained=in_stack))
        return
    for child_name, child in module.named_children():
        _cut(
            child,
            f"{name}.{child_name}" if name else child_name,
            isinstance(module, nn.ModuleList),
            found,
        )


@contextmanager
def capturing(part: Part, step: int) -> Iterator[Capture]:
    """Capture `part` while the block runs forward and backward. Only its first call counts; a part that is called again
    (weight sharing over depth) is reported by `calls` and not audited."""
    capture = Capture(step, part, {})
    hooks = [
        part.module.register_forward_pre_hook(
            lambda module, args, kwargs: _before(capture, args, kwargs), with_kwargs=True
        ),
        part.module.register_forward_hook(lambda module, args, output: _after(capture, output)),
    ]
    try:
        yield capture
    finally:
        for hook in hooks:
            hook.remove()


def _before(capture: Capture, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    capture.calls += 1
    if capture.calls > 1:
        return
    capture.precision = present(next(capture.part.module.parameters()).device)
    capture.weights = {
        name: _to_cpu(value)
        for name, value in capture.part.module.state_dict(keep_vars=True).items()
    }
    capture.args = tuple(_map(value, _to_cpu) for value in args)
    capture.kwargs = {name: _map(value, _to_cpu) for name, value in kwargs.items()}
    if capture.part.chained:
        for place, tensor in enumerate(_floats((args, kwargs))):
            if tensor.requires_grad and not tensor.is_leaf:
                tensor.register_hook(_keeper(capture.input_grads, place))  # type: ignore[no-untyped-call]


def _after(capture: Capture, output: Any) -> None:
    if capture.calls > 1:
        return
    for place, tensor in enumerate(_floats(output)):
        capture.outputs.append(_to_cpu(tensor))
        if tensor.requires_grad:
            tensor.register_hook(_keeper(capture.output_grads, place))  # type: ignore[no-untyped-call]


def _keeper(into: dict[int, Tensor], place: int) -> Callable[[Tensor], None]:
    def keep(grad: Tensor) -> None:
        into[place] = _to_cpu(grad)

    return keep


def judge(
    capture: Capture, grads: Mapping[str, Tensor], referee: Accelerator, *, key: int = 0
) -> Finding | None:
    """Recompute the captured part on `referee` and compare outputs, input gradients and weight gradients.

    `grads`: the step's weight gradients by full parameter name. Returns None when nothing was captured (the part did not run,
    or ran more than once). A disagreement is measured again with more and larger perturbations before it is reported: a token
    that sits on the edge between two experts is not the chip's fault.
    """
    if capture.calls != 1 or not capture.outputs:
        return None
    chip = _chip_side(capture, grads)
    floats = _floats((capture.args, capture.kwargs))
    inputs = {
        **{f"input.{i}": x for i, x in enumerate(floats)},
        **{f"weight.{n}": w for n, w in capture.weights.items() if w.is_floating_point()},
    }
    right = _recompute(capture, inputs, referee, chip.keys())
    if all(torch.equal(chip[name], right[name]) for name in chip):
        return Finding(capture.part.name, capture.step, None, True, len(chip))
    worst, products = None, _products(capture)
    for repeats, ulps in MEASURING[products].perturbations:
        floors = _response(capture, inputs, right, referee, key, repeats, ulps)
        worst = _worst(chip, right, floors, products)
        if worst is None:
            break
    return Finding(capture.part.name, capture.step, worst, False, len(chip))


def _chip_side(capture: Capture, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{capture.part.name}." if capture.part.name else ""
    tensors = {f"output.{i}": output for i, output in enumerate(capture.outputs)}
    tensors |= {f"gradient of input.{i}": grad for i, grad in capture.input_grads.items()}
    if capture.output_grads and capture.part.chained:
        # A part outside a stack may share its weight (embedding and head): then the gradient is not its own.
        tensors |= {
            f"gradient of {name}": _to_cpu(grads[prefix + name])
            for name, weight in capture.part.module.named_parameters()
            if weight.requires_grad and prefix + name in grads
        }
    return tensors


def _recompute(
    capture: Capture, inputs: Mapping[str, Tensor], referee: Accelerator, wanted: Any
) -> dict[str, Tensor]:
    """The part on the referee, with the given inputs and weights; the wanted tensors, on the CPU."""
    module = referee.move(_copy(capture.part.module))
    with referee.session(Work("train", capture.step, 1)), torch.enable_grad():
        with torch.no_grad():
            for name, tensor in module.state_dict(keep_vars=True).items():
                tensor.copy_(inputs.get(f"weight.{name}", capture.weights[name]))
        leaves = [
            referee.to_device(inputs[f"input.{i}"]).requires_grad_()
            for i in range(sum(name.startswith("input.") for name in inputs))
        ]
        replacing = iter(leaves)
        args, kwargs = _map(
            (capture.args, capture.kwargs),
            lambda x: next(replacing) if x.is_floating_point() else referee.to_device(x),
        )
        with computing(capture.precision, referee.device):
            outputs = _floats(module(*args, **kwargs))
        found = {f"output.{i}": output for i, output in enumerate(outputs)}
        wrt = {f"gradient of input.{i}": leaf for i, leaf in enumerate(leaves)}
        wrt |= {f"gradient of {name}": weight for name, weight in module.named_parameters()}
        wrt = {name: tensor for name, tensor in wrt.items() if name in wanted}
        if wrt:
            places = sorted(capture.output_grads)
            incoming = [referee.to_device(capture.output_grads[i]) for i in places]
            made = torch.autograd.grad(
                [outputs[i] for i in places], list(wrt.values()), incoming, allow_unused=True
            )
            found |= {
                name: torch.zeros_like(tensor) if grad is None else grad
                for (name, tensor), grad in zip(wrt.items(), made, strict=True)
            }
    return {name: _to_cpu(found[name]) for name in wanted}


def _copy(module: nn.Module) -> nn.Module:
    """A copy without the capturing hooks, whose weights want gradients where the original's do."""
    copied = copy.deepcopy(module)
    copied._forward_pre_hooks.clear()
    copied._forward_hooks.clear()
    return copied


def _response(
    capture: Capture,
    inputs: Mapping[str, Tensor],
    right: Mapping[str, Tensor],
    referee: Accelerator,
    key: int,
    repeats: int,
    ulps: int,
) -> dict[str, numerics.Comparison]:
    """Tensor -> the largest response to inputs and weights moved by `ulps` units in the last place."""
    floors: dict[str, numerics.Comparison] = {}
    units = _units(capture, inputs)
    for repeat in range(repeats):
        moved = dict(inputs)
        for nudge in range(ulps):
            moved = {
                n: numerics.perturb_one_ulp(x, draws.key(key, n, repeat, nudge), units[n])
                for n, x in moved.items()
            }
        for name, value in _recompute(capture, moved, referee, right.keys()).items():
            found = numerics.compare(value, right[name])
            before = floors.get(name)
            floors[name] = found if before is None or found.rms > before.rms else before
    return floors


def _units(capture: Capture, inputs: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    """Of which type's unit each input and weight is moved: the one in which a product reads it."""
    products = DTYPE[_products(capture)]
    names = {f"weight.{name}" for name in rounded(capture.part.module)}
    return {
        name: products if name in names or name.startswith("input.") else x.dtype
        for name, x in inputs.items()
    }


def _worst(
    chip: Mapping[str, Tensor],
    right: Mapping[str, Tensor],
    floors: Mapping[str, numerics.Comparison],
    products: Precision,
) -> Disagreement | None:
    """The tensor furthest above its bound; None when all are within."""
    margin, least = MEASURING[products].margin, numerics.tolerance(DTYPE[products]).unit
    worst: tuple[float, Disagreement] | None = None
    for name, value in chip.items():
        found = numerics.compare(value, right[name])
        unit = max(least, numerics.tolerance(value.dtype).unit)
        bound = margin * max(floors[name].rms, unit)
        tail = margin * max(floors[name].tail, unit)
        excess = max(found.rms / bound, found.tail / tail, float("inf") if found.nonfinite else 0.0)
        if excess > 1.0 and (worst is None or excess > worst[0]):
            reason = (
                f"{found.nonfinite} values not finite"
                if found.nonfinite
                else f"error {found.rms:.2e} (largest {found.tail:.2e}), allowed {bound:.1e} ({tail:.1e})"
            )
            worst = excess, Disagreement(name, found.rms, bound, reason)
    return None if worst is None else worst[1]


def _products(capture: Capture) -> Precision:
    """Of what type the part's products are: a norm, a table or the head has none of the narrower."""
    return capture.precision if rounded(capture.part.module) else "fp32"


def _to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _map(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """`fn` over every tensor in tuples, lists, dicts and dataclasses; anything else stays as it is."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(item, fn) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_map(item, fn) for item in value)
    if isinstance(value, dict):
        return {name: _map(item, fn) for name, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changes = {
            item.name: _map(getattr(value, item.name), fn)
            for item in dataclasses.fields(value)
            if item.init
        }
        return dataclasses.replace(value, **changes)
    return value


def _floats(value: Any) -> list[Tensor]:
    """All floating-point tensors inside `value`, in the order in which `_map` meets them."""
    found: list[Tensor] = []

    def look(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            found.append(tensor)
        return tensor

    _map(value, look)
    return found


def turn(parts_: Sequence[Part], audit_number: int) -> Part:
    """Whose turn it is: every part once before any comes again, in an order that does not follow the depth."""
    order = draws.permutation(draws.key(0, "guard.audit", audit_number // len(parts_)), len(parts_))
    return parts_[int(order[audit_number % len(parts_)])]
