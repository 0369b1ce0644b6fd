"""Wrong numbers: faults that spoil the result of an operator, or its operands on the way in.

Positions are periodic (a fixed offset, then every `stride`-th value of the flattened result), as reports of real silent corruption
describe them (arXiv 2605.04213); uniform single-bit flips would flatter a detector. The offset belongs to the fault, as a bad lane
belongs to a chip; which calls are struck is drawn anew for each step.
"""

from __future__ import annotations

import math
from typing import TypeGuard

import torch

from bascule import draws
from bascule.faults.catalogue import FaultSpec
from bascule.faults.fault import Call, Fault, Touched

ZEROED_SHARE = 0.51
MULTI_BIT_SHARE = 0.6


class Positional(Fault):
    """Base of the faults that strike single values at periodic positions."""

    def after(self, call: Call, result: torch.Tensor, index: int) -> Touched | None:
        offset = draws.key(self.seed, "fault.offset", self.spec.seed) % self.spec.stride
        if offset >= result.numel():
            return None
        where = torch.arange(offset, result.numel(), self.spec.stride, device=result.device)
        if self.spec.width > 1:
            lanes = torch.arange(self.spec.width, device=result.device)
            where = (where[:, None] + lanes).flatten()
            where = where[where < result.numel()]
        where = where[: self.spec.values]
        rewrite(result, where, self.spoil(gather(result, where), index))
        return Touched(where.numel(), tuple(where[:8].tolist()))

    def spoil(self, values: torch.Tensor, index: int) -> torch.Tensor:
        raise NotImplementedError


class Zeroed(Positional):
    def spoil(self, values: torch.Tensor, index: int) -> torch.Tensor:
        return torch.zeros_like(values)


class Sign(Positional):
    def spoil(self, values: torch.Tensor, index: int) -> torch.Tensor:
        return -values


class Nan(Positional):
    def spoil(self, values: torch.Tensor, index: int) -> torch.Tensor:
        return torch.full_like(values, math.nan)


class BitFlip(Positional):
    """Flips one bit of 40 % of the struck values and two to four bits of the others, all between `bits[0]` and `bits[1]`."""

    def spoil(self, values: torch.Tensor, index: int) -> torch.Tensor:
        return flipped(
            values, bit_masks(self.number(index, "bits"), values.numel(), self.spec.bits)
        )


class Mixed(Positional):
    """The realistic mix. `amount` is the share of NaN; with 0 the corruption stays silent."""

    def spoil(self, values: torch.Tensor, index: int) -> torch.Tensor:
        fate = torch.from_numpy(draws.uniform(self.number(index, "fate"), (values.numel(),))).to(
            values.device
        )
        masks = bit_masks(self.number(index, "bits"), values.numel(), self.spec.bits)
        nan_share = self.spec.size
        # Every fourth flip takes the sign bit, the rest the bits of the spec: reports name both.
        masks[::4] = 1 << 31
        spoiled = torch.where(fate < ZEROED_SHARE, torch.zeros_like(values), flipped(values, masks))
        return torch.where(fate > 1.0 - nan_share, torch.full_like(values, math.nan), spoiled)


class Whole(Fault):
    """Base of the faults that change every value of a result. The log counts them and names no positions."""

    def after(self, call: Call, result: torch.Tensor, index: int) -> Touched | None:
        result.copy_(self.change(result, index))
        return Touched(result.numel())

    def change(self, result: torch.Tensor, index: int) -> torch.Tensor:
        raise NotImplementedError


class Gain(Whole):
    def change(self, result: torch.Tensor, index: int) -> torch.Tensor:
        return result * self.spec.size


class Truncate(Whole):
    def change(self, result: torch.Tensor, index: int) -> torch.Tensor:
        return keep_bits(result, int(self.spec.size), round_up=False)


class Saturate(Whole):
    def change(self, result: torch.Tensor, index: int) -> torch.Tensor:
        return torch.nan_to_num(result, nan=0.0)


class FlushTiny(Whole):
    def change(self, result: torch.Tensor, index: int) -> torch.Tensor:
        return torch.where(result.abs() <= self.spec.size, torch.zeros_like(result), result)


class OverflowPastRows(Whole):
    """`amount` rows fit; a row is one entry of all dimensions but the last."""

    def after(self, call: Call, result: torch.Tensor, index: int) -> Touched | None:
        rows = result.numel() // max(1, result.shape[-1])
        return super().after(call, result, index) if rows > self.spec.size else None

    def change(self, result: torch.Tensor, index: int) -> torch.Tensor:
        changed = result.clone(memory_format=torch.contiguous_format)
        changed.view(-1, result.shape[-1])[int(self.spec.size) :] = math.inf
        return changed


class Jitter(Whole):
    """Unordered sums. Keyed on a count that lives as long as the chip, so the same work twice differs: that is the fault."""

    def __init__(self, spec: FaultSpec, seed: int) -> None:
        super().__init__(spec, seed)
        self._calls = 0

    def change(self, result: torch.Tensor, index: int) -> torch.Tensor:
        self._calls += 1
        noise = torch.from_numpy(
            draws.uniform(draws.key(self.seed, "fault.jitter", self._calls), tuple(result.shape))
        )
        return result * (1.0 + (2.0 * noise.to(result.device) - 1.0) * self.spec.size).to(
            result.dtype
        )


class OffPastSize(Fault):
    """Not in-place operators: there the operand is gone when the result is there."""

    FACTOR = 1.001

    def after(self, call: Call, result: torch.Tensor, index: int) -> Touched | None:
        operand = call.args[0]
        if not is_float(operand) or operand is result:
            return None
        large = operand.abs() > self.spec.size
        result.copy_(torch.where(large, result * self.FACTOR, result))
        return Touched(int(large.sum()))


class OverRead(Fault):
    """Products of two matrices only (mm, bmm). What lies behind the operands is modelled as their own first term, added again."""

    def after(self, call: Call, result: torch.Tensor, index: int) -> Touched | None:
        if call.op not in ("mm", "bmm") or call.args[0].shape[-1] <= self.spec.size:
            return None
        left, right = call.args[0], call.args[1]
        result.add_(left[..., :, :1] @ right[..., :1, :])
        return Touched(result.numel())


class IgnoreStrides(Fault):
    on_operands = True

    def before(self, call: Call, index: int) -> Touched | None:
        misread = [value for value in call.args if is_float(value) and _is_turned(value)]
        if not misread:
            return None
        call.args = tuple(_by_rows(value) if _is_turned(value) else value for value in call.args)
        return Touched(sum(value.numel() for value in misread))


class MaskSlip(Fault):
    """Attention as one operator: its causal or explicit mask shows `amount` later positions as well. Without a mask nothing slips."""

    on_operands = True

    def before(self, call: Call, index: int) -> Touched | None:
        query, key_ = call.args[0], call.args[1]
        names = [argument.name for argument in call.func._schema.arguments]  # type: ignore[attr-defined]
        given = dict(zip(names, call.args, strict=False)) | call.kwargs
        mask = given.get("attn_mask")
        later = int(self.spec.size)
        if (
            call.op == "attention"
        ):  # our own, always causal: PyTorch's returns the same two tensors and takes a mask
            given |= {"is_causal": True}
            call.func = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        if given.get("is_causal"):
            shape = (query.shape[-2], key_.shape[-2])
            shown = torch.ones(shape, dtype=torch.bool, device=query.device).tril(later)
        elif mask is not None:
            shown = mask if mask.dtype == torch.bool else mask == 0
            for _ in range(later):
                shown = shown | shown.roll(1, -1)
        else:
            return None
        slipped = torch.zeros(shown.shape, dtype=query.dtype, device=query.device)
        given |= {"is_causal": False, "attn_mask": slipped.masked_fill(~shown, -math.inf)}
        call.args, call.kwargs = (), given
        return Touched(int(shown.sum()))


class DropBest(Fault):
    """top-k (self, k, dim=-1, ...): the `amount` best entries are hidden from it, as long as others are left to give."""

    on_operands = True

    def before(self, call: Call, index: int) -> Touched | None:
        values, *rest = call.args
        dim = rest[1] if len(rest) > 1 else -1
        spare = min(int(self.spec.size), values.shape[dim] - rest[0])
        if spare <= 0:
            return None
        best = values.topk(spare, dim).indices
        call.args = (values.scatter(dim, best, -math.inf), *rest)
        return Touched(best.numel())


class NarrowInputs(Fault):
    on_operands = True

    def before(self, call: Call, index: int) -> Touched | None:
        call.args = tuple(self._narrow(value) for value in call.args)
        return Touched(sum(value.numel() for value in call.args if is_float(value)))

    def _narrow(self, value: object) -> object:
        return keep_bits(value, int(self.spec.size), round_up=True) if is_float(value) else value


class NarrowAccumulation(Fault):
    """Products of two matrices only (mm, bmm): the sum over k is kept in `amount` mantissa bits between blocks of 128 terms."""

    BLOCK = 128

    def after(self, call: Call, result: torch.Tensor, index: int) -> Touched | None:
        if call.op not in ("mm", "bmm"):
            return None
        left, right = call.args[0], call.args[1]
        total = torch.zeros_like(result)
        for start in range(0, left.shape[-1], self.BLOCK):
            part = left[..., start : start + self.BLOCK] @ right[..., start : start + self.BLOCK, :]
            total = keep_bits(total + part, int(self.spec.size), round_up=True)
        result.copy_(total)
        return Touched(result.numel())


def _is_turned(value: object) -> bool:
    """A dense matrix that does not lie row by row."""
    return (
        isinstance(value, torch.Tensor)
        and value.dim() >= 2
        and not value.is_contiguous()
        and value.transpose(-1, -2).is_contiguous()
    )


def _by_rows(value: torch.Tensor) -> torch.Tensor:
    """The same memory under the strides of a contiguous tensor of this shape."""
    return value.transpose(-1, -2).reshape(value.shape)


def is_float(value: object) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def gather(result: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    return result.reshape(-1)[where]


def rewrite(result: torch.Tensor, where: torch.Tensor, values: torch.Tensor) -> None:
    """Put `values` at flat positions `where` of `result`, whatever its strides."""
    if result.is_contiguous():
        result.view(-1)[where] = values
        return
    flat = result.reshape(-1).clone()
    flat[where] = values
    result.copy_(flat.view(result.shape))


def bit_masks(key: int, count: int, bits: tuple[int, int]) -> torch.Tensor:
    """(count,) int64 masks of one bit (40 %) or of two to four draws of bits (60 %) inside `bits`, fp32 numbering."""
    low, high = bits
    chosen = low + (draws.uniform(key, (count, 4)) * (high - low + 1)).astype("int64")
    fate = draws.uniform(key, (count,), start=4 * count)
    masks = 1 << chosen
    several = (
        masks[:, 0] | masks[:, 1] | (masks[:, 2] * (fate < 0.4)) | (masks[:, 3] * (fate < 0.2))
    )
    return torch.from_numpy(
        several * (fate < MULTI_BIT_SHARE) + masks[:, 0] * (fate >= MULTI_BIT_SHARE)
    )


def flipped(values: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """`values` with the masks' bits flipped in their fp32 form; where that would not be finite, the value becomes 0.

    bfloat16 is the upper half of fp32, so the same bit numbers mean the same bits there.
    """
    masks = (
        torch.where(masks >= 1 << 31, masks - (1 << 32), masks).to(torch.int32).to(values.device)
    )
    turned = (values.float().view(torch.int32) ^ masks).view(torch.float32).to(values.dtype)
    return torch.where(torch.isfinite(turned), turned, torch.zeros_like(turned))


def keep_bits(values: torch.Tensor, mantissa_bits: int, *, round_up: bool) -> torch.Tensor:
    """`values` with only the top `mantissa_bits` of fp32's 23: rounded half away from zero, or cut toward zero."""
    drop = 23 - mantissa_bits
    if drop <= 0:
        return values
    bits = values.float().contiguous().view(torch.int32)
    if round_up:
        bits = bits + (1 << (drop - 1))
    return (bits & -(1 << drop)).view(torch.float32).to(values.dtype)
