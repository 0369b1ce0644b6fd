"""From a fault on paper (FaultSpec) to a fault at work (Fault). The table is the list: one class per kind of the catalogue."""

from __future__ import annotations

from bascule.faults import arithmetic, collective, memory, runtime, timing
from bascule.faults.catalogue import FaultSpec, kinds
from bascule.faults.fault import Fault

CLASSES: dict[str, type[Fault]] = {
    "zeroed": arithmetic.Zeroed,
    "bit_flip": arithmetic.BitFlip,
    "sign": arithmetic.Sign,
    "mixed": arithmetic.Mixed,
    "nan": arithmetic.Nan,
    "gain": arithmetic.Gain,
    "truncate": arithmetic.Truncate,
    "narrow_inputs": arithmetic.NarrowInputs,
    "narrow_accumulation": arithmetic.NarrowAccumulation,
    "saturate": arithmetic.Saturate,
    "flush_tiny": arithmetic.FlushTiny,
    "overflow_past_rows": arithmetic.OverflowPastRows,
    "jitter": arithmetic.Jitter,
    "drop_best": arithmetic.DropBest,
    "off_past_size": arithmetic.OffPastSize,
    "over_read": arithmetic.OverRead,
    "ignore_strides": arithmetic.IgnoreStrides,
    "mask_slip": arithmetic.MaskSlip,
    "out_of_memory": memory.OutOfMemory,
    "fragmentation": memory.Fragmentation,
    "stale": memory.Stale,
    "leak": memory.Leak,
    "bit_rot": memory.BitRot,
    "wrong_sum": collective.WrongSum,
    "double_sum": collective.DoubleSum,
    "lost_tail": collective.LostTail,
    "slow": timing.Slow,
    "hang": timing.Hang,
    "host_fallback": timing.HostFallback,
    "compile_stall": timing.CompileStall,
    "missing_operator": runtime.MissingOperator,
    "process_death": runtime.ProcessDeath,
    "device_error": runtime.DeviceError,
}


def build(specs: tuple[FaultSpec, ...], seed: int) -> list[Fault]:
    """Storage faults are left out: they strike files, through faults.storage.damage, not sessions."""
    return [
        CLASSES[spec.kind](spec, seed) for spec in specs if kinds()[spec.kind].family != "storage"
    ]
