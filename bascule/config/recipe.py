"""The whole recipe, and what its sections must agree on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from bascule.config.model import ModelConfig
from bascule.config.section import Section
from bascule.config.serving import EvaluateConfig, ServeConfig
from bascule.config.training import DataConfig, GrpoConfig, PretrainConfig, SftConfig, TrainConfig
from bascule.config.trust import GuardConfig, PoolConfig, QualifyConfig, one_pool_a_chip
from bascule.errors import nearest


class Recipe(Section):
    """The whole recipe. Pools are listed in `prefer` in the owner's order of preference (default: as written)."""

    name: str = Field(..., pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0)
    threads: int = Field(
        1,
        ge=1,
        le=1024,
        description="CPU threads of each worker; part of what makes two runs bit-equal",
    )
    strict: bool = Field(False, description="every warning is an error")
    prefer: tuple[str, ...] = ()
    # A pool's name is a folder's under evidence/, so no slash.
    pools: dict[Annotated[str, Field(pattern=r"^\w[\w.-]*$")], PoolConfig] = Field(
        ..., min_length=1
    )
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    pretrain: PretrainConfig = Field(default_factory=PretrainConfig)
    sft: SftConfig = Field(default_factory=SftConfig)
    grpo: GrpoConfig = Field(default_factory=GrpoConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    guard: GuardConfig = Field(default_factory=GuardConfig)
    qualify: QualifyConfig = Field(default_factory=QualifyConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    serve: ServeConfig = Field(default_factory=ServeConfig)

    @model_validator(mode="before")
    @classmethod
    def _take_pools_apart(cls, raw: Any) -> Any:
        whole = isinstance(raw, Mapping) and isinstance(raw.get("pools"), Mapping)
        return one_pool_a_chip(raw) if whole else raw

    @model_validator(mode="after")
    def _check_combination(self) -> Self:
        for pool in self.prefer:
            if pool not in self.pools:
                raise ValueError(
                    f"prefer: '{pool}' is not a pool; pools: {', '.join(self.pools)}.{nearest(pool, self.pools)}"
                )
        if len(set(self.prefer)) != len(self.prefer):
            raise ValueError(f"prefer: {list(self.prefer)} names a pool twice")
        if (
            "grpo" in self.train.phases
            and self.grpo.prompts * self.grpo.group_size % self.grpo.updates_per_rollout
        ):
            raise ValueError(
                f"grpo.updates_per_rollout={self.grpo.updates_per_rollout} must divide prompts*group_size="
                f"{self.grpo.prompts * self.grpo.group_size}"
            )
        if "pretrain" in self.train.phases and self.pretrain.data is None:
            raise ValueError(
                "train.phases holds 'pretrain' and pretrain.data is not set; give the folder that bascule tokenize wrote"
            )
        if len(set(self.train.phases)) != len(self.train.phases):
            raise ValueError(
                f"train.phases: {list(self.train.phases)} names a phase twice; each of pretrain, sft and grpo is allowed once"
            )
        return self

    @property
    def order(self) -> tuple[str, ...]:
        """All pools, preferred first; pools that `prefer` leaves out follow in the order written."""
        return self.prefer + tuple(pool for pool in self.pools if pool not in self.prefer)

    def siblings(self, pool: str) -> tuple[str, ...]:
        """The other chips of the same pool, in the order in which they are tried."""
        family = self.pools[pool].chip_of
        return tuple(
            one
            for one in self.order
            if family and self.pools[one].chip_of == family and one != pool
        )

    def phase_steps(self) -> dict[str, int]:
        """Steps of each phase in order, after `train.steps` has cut them."""
        left = self.train.steps
        result: dict[str, int] = {}
        for phase in self.train.phases:
            sections: dict[str, PretrainConfig | SftConfig | GrpoConfig]
            sections = {"pretrain": self.pretrain, "sft": self.sft, "grpo": self.grpo}
            wanted = sections[phase].steps
            result[phase] = wanted if left is None else min(wanted, left)
            left = None if left is None else left - result[phase]
        return result

    def total_steps(self) -> int:
        return sum(self.phase_steps().values())
