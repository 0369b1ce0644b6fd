"""Is every matrix product of this step right? Checked against a checksum that costs O(n^2), on the chip, with one wait a step.

For C = A B and a fixed vector r, `C r` must equal `A (B r)` up to rounding. `Checksums` is a dispatch mode: every mm, addmm,
bmm and baddbmm below it is checked, so the forward product and both backward products of a linear layer are covered without
the model knowing. r has random signs and sizes: a vector of ones would not see swapped columns, nor rows that sum to zero by
construction. The bound per row comes from numerics.checksum_bound (feasibility.md 6: 0 false alarms in 655,422 checks). What stays below
it but in every output, such as a narrower accumulator, is seen by how exact the products are on average (guard/spot).

Grouped products have the same checksum (guard/grouped). Fused attention, softmax and RMS norm are held to laws of their own (guard/attention, guard/invariants). Not covered: routing, rotation
and other operators that have no law; audits and the replays at certification are for those. A chip whose matrix-vector product is wrong in the same way would check itself; the referee
does not share that fault.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from bascule import draws, numerics
from bascule.dispatch import OperatorMode
from bascule.guard import spot
from bascule.guard.attention import FUSED, attention_ratio
from bascule.guard.grouped import grouped_ratio
from bascule.guard.invariants import LAWS, rms_norm_ratio

aten, ours = torch.ops.aten, torch.ops.bascule

_OTHER, _LAW, _NORM, _GROUPED = (-1, -1, None), (-2, -2, None), (-3, -3, None), (-4, -4, None)

# What each operator multiplies: positions of A and B among the arguments, and of the added term, if any. One table with the
# fused operators (None): a step dispatches some 1,500 operators, and each look-up hashes one in Python.
_CHECKED: dict[Any, tuple[int, int, int | None] | None] = {
    aten.mm.default: (0, 1, None),
    aten.bmm.default: (0, 1, None),
    aten.addmm.default: (1, 2, 0),
    aten.baddbmm.default: (1, 2, 0),
    aten._grouped_mm.default: _GROUPED,
    **dict.fromkeys(FUSED),
    **dict.fromkeys(LAWS, _LAW),
    **dict.fromkeys((ours.rms_norm.default, ours.add_rms_norm.default), _NORM),
}


TOGETHER = -1
"""In the place of a product's number: no single one is wrong beyond its bound, all of a step are too inexact (guard/spot)."""


@dataclass(frozen=True)
class Violation:
    """One product that is wrong. `ratio` is the largest row's error over its bound (inf: not finite where it must be).

    `op_index` counts checked products of the step from 0; `name` is the parameter that took part, `""` when none did
    (activations with activations); `shape` is (m, k, n).
    """

    op_index: int
    op: str
    name: str
    direction: str
    shape: tuple[int, int, int]
    ratio: float

    def __str__(self) -> str:
        if self.op_index == TOGETHER:
            return f"all products together are {self.ratio:.3g} times as inexact as sums in fp32 may be"
        m, k, n = self.shape
        where = f" of {self.name}" if self.name else ""
        return f"{self.op} #{self.op_index}{where} ({self.direction}, {m}x{k}x{n}): {self.ratio:.3g} times its bound"


@dataclass(frozen=True)
class Product:
    """The tensors of one wrong product, on the CPU: enough to reproduce it. `addend` None for plain products."""

    violation: Violation
    left: Tensor
    right: Tensor
    addend: Tensor | None
    output: Tensor


@dataclass
class _Check:
    op: str
    shape: tuple[int, int, int]
    node: Any
    storages: tuple[int, int]
    ratio: Tensor


@dataclass
class Checksums(OperatorMode):
    """Enter inside the accelerator's session, around forward and backward; call `violations()` after leaving.

    `only`: check a product only when `only(op_index)` says so (budgeted sampling). `keep`: keep the tensors of the first
    wrong product; costs one wait per product, so only replays ask for it. `turn`: which outputs are computed again (guard/spot); the step.
    """

    names: dict[int, str] = field(default_factory=dict)
    only: Callable[[int], bool] | None = None
    keep: bool = False
    turn: int = 0
    kept: Product | None = None
    _checks: dict[int, _Check] = field(default_factory=dict)
    _laws: list[tuple[int, _Check]] = field(default_factory=list)
    _samples: dict[int, spot.Sample] = field(default_factory=dict)
    _squares: dict[int, Tensor] = field(default_factory=dict)
    _copies: list[Tensor] = field(default_factory=list)
    _count: int = 0

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = dict(self.names)
        self._norms = _Norms(self)

    def __enter__(self) -> Checksums:
        super().__enter__()  # type: ignore[no-untyped-call]
        self._norms.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self._norms.__exit__(*error)  # type: ignore[no-untyped-call]
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._copies.clear()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        places = _CHECKED.get(func, _OTHER)
        if places is _OTHER:
            return output
        if places is _LAW:
            if func is aten._to_copy.default:
                self._follow(args[0], output)
            first = output[0] if isinstance(output, tuple) else output
            self._obey(func.overloadpacket.__name__, LAWS[func](args, output), first)
            return output
        if places is _NORM:
            x, weight, eps = (args[0], *args[1:]) if len(args) == 3 else (output[2], *args[2:])
            self._norms._judge(output[0], x, weight.shape, weight, eps)
            return output
        index, self._count = self._count, self._count + 1
        if self.only is None or self.only(index):
            if places is _GROUPED:
                self._check_grouped(index, args, kwargs or {}, output)
            elif places is None:
                self._check_attention(index, func, args, kwargs or {}, output)
            else:
                self._check(index, func, places, args, kwargs or {}, output)
        return output

    @property
    def products_seen(self) -> int:
        return self._count

    @property
    def products_checked(self) -> int:
        return len(self._checks)

    def violations(self) -> list[Violation]:
        """All wrong products in the order they ran. Waits for the chip."""
        checks = sorted([*self._checks.items(), *self._laws], key=lambda one: one[0])
        found = [
            self._violation(index, check, ratio)
            for (index, check), ratio in zip(checks, self._ratios(checks), strict=True)
            if not ratio <= 1.0
        ]
        together = spot.ratio_of_all([*self._squares.values()])
        if not found and not together <= 1.0:
            found.append(Violation(TOGETHER, "products", "", "all together", (0, 0, 0), together))
        return found

    def worst_ratio(self) -> float:
        """The largest error over its bound of all products and laws of the step: how much room the bound had."""
        ratios = self._ratios([*self._checks.items(), *self._laws])
        return max([*ratios, spot.ratio_of_all([*self._squares.values()])], default=0.0)

    def _ratios(self, checks: Sequence[tuple[int, _Check]]) -> list[float]:
        if not checks:
            return []
        told = torch.stack([check.ratio.double() for _, check in checks]).tolist()
        products = (check is self._checks.get(index) for index, check in checks)
        return [
            self._ratio(index, ratio) if product else ratio
            for (index, _), ratio, product in zip(checks, told, products, strict=True)
        ]

    def _ratio(self, index: int, ratio: float) -> float:
        """Of a product's checksum, or of how exact it is: the worse."""
        if index not in self._samples or not ratio <= 1.0:
            return ratio
        if index not in self._squares:
            self._squares[index] = spot.squares(self._samples[index])
        return max(ratio, spot.ratio_of_one(self._squares[index]))

    def _check(
        self,
        index: int,
        func: Any,
        places: tuple[int, int, int | None],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        output: Tensor,
    ) -> None:
        left_at, right_at, addend_at = places
        left, right = args[left_at], args[right_at]
        if not output.is_floating_point() or output.numel() == 0 or left.numel() == 0:
            return
        addend = None if addend_at is None else _scaled(args[addend_at], kwargs.get("beta", 1))
        alpha = kwargs.get("alpha", 1)
        ratio = product_ratio(left, right, output, addend, alpha=alpha)
        if (self.turn + index) % spot.EVERY == 0:
            turn = self.turn + index // spot.EVERY
            taken = spot.sample(left, right, output, addend, alpha=alpha, turn=turn)
            if taken is not None:
                self._samples[index] = taken
        shape = (left.shape[-2], left.shape[-1], right.shape[-1])
        storages = (left.untyped_storage().data_ptr(), right.untyped_storage().data_ptr())
        check = _Check(
            func.overloadpacket.__name__, shape, torch._C._current_autograd_node(), storages, ratio
        )
        self._checks[index] = check
        if self.keep and self.kept is None and not self._ratio(index, float(ratio)) <= 1.0:
            tensors = [x.detach().cpu().clone() for x in (left, right, output)]
            kept_addend = None if addend is None else addend.detach().cpu().clone()
            violation = self._violation(index, check, self._ratio(index, float(ratio)))
            self.kept = Product(violation, tensors[0], tensors[1], kept_addend, tensors[2])

    def _check_attention(
        self, index: int, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Any
    ) -> None:
        q, k = (args[1], args[2]) if FUSED[func].backward else (args[0], args[1])
        probe = _probe(
            q.shape[-1], torch.float64 if q.dtype == torch.float64 else torch.float32, q.device
        )
        ratio = attention_ratio(func, args, kwargs, outputs, probe)
        if ratio is not None:
            shape = (q.shape[-2], q.shape[-1], k.shape[-2])
            self._checks[index] = _Check(
                "attention", shape, torch._C._current_autograd_node(), (0, 0), ratio
            )

    def _check_grouped(
        self, index: int, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor
    ) -> None:
        left, right = args[:2]
        ends = args[2] if len(args) > 2 else kwargs.get("offs")
        if ends is None or not output.numel() or not left.numel():
            return
        ratio = grouped_ratio(
            left, right, ends, output, _probe(output.shape[-1], torch.float32, output.device)
        )
        shape = (left.shape[-2], left.shape[-1], right.shape[-1])
        storages = (left.untyped_storage().data_ptr(), right.untyped_storage().data_ptr())
        self._checks[index] = _Check(
            "grouped_mm", shape, torch._C._current_autograd_node(), storages, ratio
        )

    def _follow(self, source: Tensor, copy: Tensor) -> None:
        """A parameter's copy in another type (model/precision.py) goes by its name. It is held to the end of the step: its address must not
        become another tensor's."""
        if name := self.names.get(source.untyped_storage().data_ptr()):
            self.names[copy.untyped_storage().data_ptr()] = name
            self._copies.append(copy)

    def _obey(self, op: str, ratio: Tensor, output: Tensor, touches: int = 0) -> None:
        """Note an operator that is no product; it is counted at the place of the product that follows it."""
        n = output.shape[-1] if output.dim() else 1
        shape = (output.numel() // max(1, n), n, n)
        check = _Check(op, shape, torch._C._current_autograd_node(), (touches, 0), ratio)
        self._laws.append((self._count, check))

    def _violation(self, index: int, check: _Check, ratio: float) -> Violation:
        name, direction = self._describe(check)
        return Violation(
            index, check.op, name, direction, check.shape, math.inf if math.isnan(ratio) else ratio
        )

    def _describe(self, check: _Check) -> tuple[str, str]:
        """(parameter name, "forward" | "backward to the input" | "backward to the weight")."""
        touched = next((self.names[at] for at in check.storages if at in self.names), "")
        if check.node is None:
            return touched, "forward"
        if touched:
            return touched, "backward to the input"
        behind = self._parameter_behind(check.node)
        return behind, "backward to the weight" if behind else "backward"

    def _parameter_behind(self, node: Any, depth: int = 3) -> str:
        """Name of the parameter that this autograd node feeds within a few view nodes, or an empty string."""
        for following, _ in node.next_functions:
            variable = getattr(following, "variable", None)
            if variable is not None:
                if variable.dim() < 2:  # a bias: its gradient is a sum, not a product
                    continue
                return self.names.get(variable.untyped_storage().data_ptr(), "")
            if (
                following is not None
                and depth
                and following.name().startswith(
                    ("TBackward", "Transpose", "View", "Select", "Unbind", "Unsafe", "ToCopy")
                )
            ):
                found = self._parameter_behind(following, depth - 1)
                if found:
                    return found
        return ""


class _Norms(TorchFunctionMode):  # type: ignore[misc]
    """Sees PyTorch's RMS norm as one function: where there is no fused kernel the dispatcher sees only its pieces."""

    def __init__(self, checksums: Checksums) -> None:
        super().__init__()
        self.checksums = checksums

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is functional.rms_norm:
            self._judge(output, *args, **(kwargs or {}))
        return output

    def _judge(
        self,
        output: Tensor,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        eps: float | None = None,
    ) -> None:
        if len(normalized_shape) != 1:
            return
        dtype = torch.float64 if output.dtype == torch.float64 else torch.float32
        probe = _probe(output.shape[-1], dtype, output.device)
        touches = 0 if weight is None else weight.untyped_storage().data_ptr()
        ratio = rms_norm_ratio(input, weight, eps, output, probe)
        self.checksums._obey("rms_norm", ratio, output, touches)


def parameter_names(model: nn.Module) -> dict[int, str]:
    """Storage address -> parameter name, for naming what a violation hit. Tied parameters keep their first name."""
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        names.setdefault(parameter.untyped_storage().data_ptr(), name)
    return names


@torch.no_grad()
def product_ratio(
    left: Tensor, right: Tensor, output: Tensor, addend: Tensor | None = None, *, alpha: float = 1
) -> Tensor:
    """Largest checksum error over its bound, a scalar on the chip. left (..., m, k), right (..., k, n), output (..., m, n).

    Rows whose expected checksum is not finite are passed over: then an input was already bad, and the operator that made it
    bad is the one to name. So are rows whose product may overflow: training that diverged is not the chip's fault. NaN in the
    result means that the chip made something non-finite of finite inputs.
    """
    dtype = torch.float64 if output.dtype == torch.float64 else torch.float32
    a, b, c = left.to(dtype), right.to(dtype), output.to(dtype)
    probe = _probe(c.shape[-1], dtype, c.device)
    expected = _times_vector(a, _times_vector(b, probe))
    if alpha != 1:
        expected = expected * alpha
    if addend is not None:
        added = addend.to(dtype).expand(c.shape)
        expected = expected + _times_vector(added, probe)
    norm = torch.linalg.vector_norm(b, dim=(-2, -1)) * abs(alpha)
    half = output.dtype in (torch.float16, torch.bfloat16)
    output_norms = torch.linalg.vector_norm(c, dim=-1) if half else None
    rows = _row_norms(a)
    bound = numerics.checksum_bound(
        rows, norm, a.shape[-1], c.shape[-1], output_norms, output.dtype
    )
    if addend is not None:
        # The addend's own rows, not the sum: where it nearly cancels the product (Muon's beta A + alpha A A), the sum is small
        # and its rounding is not.
        bound = bound + torch.linalg.vector_norm(added, dim=-1) * (
            numerics.tolerance(dtype).unit * math.sqrt(c.shape[-1]) * numerics.CHECKSUM_MARGIN
        )
    ratio = (_times_vector(c, probe) - expected).abs_().div_(bound)
    # isfinite in half its operators: NaN is not below infinity either.
    judged = torch.addcmul(expected, rows, norm.unsqueeze(-1)).abs_() < math.inf
    worst: Tensor = torch.where(judged, ratio, 0.0).amax()
    return worst


def _times_vector(matrix: Tensor, vector: Tensor) -> Tensor:
    """matrix (..., m, k) times vector (..., k). No bmm here: a checked product must not check itself, nor count as one."""
    if matrix.dim() == 2:
        return torch.mv(matrix, vector)
    if vector.dim() == 1 and matrix.is_contiguous():
        return torch.mv(matrix.view(-1, matrix.shape[-1]), vector).view(matrix.shape[:-1])
    return (matrix * vector.unsqueeze(-2)).sum(-1)


def _row_norms(matrix: Tensor) -> Tensor:
    """2-norms of the rows. For a transposed view (the weight's gradient) squares and a sum are 6 times faster on CPU."""
    if matrix.dim() == 2 and matrix.stride(0) == 1 and matrix.shape[1] > 1:
        return matrix.square().sum(-1).sqrt_()
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=-1)
    return norms


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor


@functools.lru_cache(maxsize=256)
def _probe(columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The checksum vector r: sizes in (0.5, 1.5), random signs, RMS close to 1; the same in every process."""
    numbers = draws.uniform(draws.key(0, "guard.checksum", columns), (columns,))
    sizes = torch.from_numpy(numbers) + 0.5
    signs = torch.from_numpy(
        draws.uniform(draws.key(1, "guard.checksum", columns), (columns,)) < 0.5
    )
    return torch.where(signs, -sizes, sizes).to(device=device, dtype=dtype)
