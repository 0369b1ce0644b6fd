"""How far the rollout engine's log-probabilities lie from the trainer's on the same sampled tokens."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from bascule.records import Mismatch


def mismatch(
    trainer_N: Tensor, rollout_N: Tensor, weight_N: Tensor, cap: float
) -> dict[str, Tensor]:
    """Trainer against rollout engine on the same sampled tokens; keys are those of records.Mismatch, without `step`. Scalars where the
    arguments live, fp64: who wants them on the host fetches them together.

    With d = log pi_trainer - log pi_rollout and w = exp(d): K1 = mean(-d) and K3 = mean(w - 1 - d) estimate KL(rollout ||
    trainer) (Schulman 2020), chi2 = mean(w^2) - 1, effective sample ratio = mean(w)^2 / mean(w^2). `weight_N` is what the
    correction gives each token; `masked_ratio` is the share it gives nothing.
    """
    d = trainer_N.double() - rollout_N.double()
    w = d.exp()
    return {
        "mean_abs": d.abs().mean(),
        "max_abs": d.abs().max(),
        "k1_kl": -d.mean(),
        "k3_kl": (w - 1.0 - d).mean(),
        "chi2": (w * w).mean() - 1.0,
        "effective_sample_ratio": w.mean() ** 2 / (w * w).mean(),
        "capped_ratio": (w > cap).double().mean(),
        "masked_ratio": (weight_N == 0).double().mean(),
        "tokens": d.new_full((), d.numel()),
    }


def mismatch_record(
    step: int, notes: Mapping[str, float], pool: str | None = None
) -> Mismatch | None:
    """The ledger's record out of a batch's notes or a proposal's metrics; None where no rollout was scored."""
    found = {
        name.removeprefix("mismatch_"): value
        for name, value in notes.items()
        if name.startswith("mismatch_")
    }
    if not found:
        return None
    agreement = notes.get("router_agreement")
    return Mismatch.model_validate(
        {**found, "router_agreement": agreement, "step": step, "pool": pool}
    )
