"""Topology: the number of ranks that a run's state is spread over, and how."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Topology:
    """Degrees of parallelism and the ZeRO stage.

    Attributes:
        tp, pp, dp: tensor-, pipeline- and data-parallel size.
        zero_stage: 0 to 3.
        ep: expert-parallel size: number of ranks that hold different experts; they are among the data-parallel ranks.

    Raises:
        ValueError: a degree below 1, or a stage outside 0 to 3.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    zero_stage: int = 0
    ep: int = 1

    def __post_init__(self) -> None:
        if min(self.tp, self.pp, self.dp, self.ep) < 1:
            raise ValueError(f"degrees must be positive: {self}")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"ZeRO stage must be 0 to 3, not {self.zero_stage}")

    @property
    def model_parallel(self) -> int:
        """Ranks that together hold one copy of the model: tensor times pipeline."""
        return self.tp * self.pp

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        pipeline = f"·PP{self.pp}" if self.pp > 1 else ""
        experts = f"·EP{self.ep}" if self.ep > 1 else ""
        return f"TP{self.tp}{pipeline}·DP{self.dp}{experts} ZeRO-{self.zero_stage}"
