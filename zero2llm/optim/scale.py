"""Loss scaling for fp16: gradients below 6e-8 would vanish, so the loss is multiplied before the backward pass.

overflow: skip the step, S <- S / 2;   after 2,000 clean steps: S <- 2 S          Source: 1710.03740 section 3.2
"""

from __future__ import annotations

from dataclasses import dataclass

GROWTH_INTERVAL = 2000  # clean steps before the scale doubles


@dataclass
class LossScale:
    """Dynamic scale; ``enabled=False`` (fp32, bf16) keeps it at 1."""

    enabled: bool
    scale: float = 65536.0
    clean: int = 0

    def __post_init__(self) -> None:
        if not self.enabled:
            self.scale = 1.0

    def update(self, finite: bool) -> None:
        if not self.enabled:
            return
        self.clean = self.clean + 1 if finite else 0
        if not finite:
            self.scale = max(self.scale / 2, 1.0)
        elif self.clean == GROWTH_INTERVAL:
            self.scale, self.clean = self.scale * 2, 0
