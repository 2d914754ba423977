"""What one request asks of the sampler."""

from __future__ import annotations

from zero2llm.core.config import config


@config
class Sampling:
    """temperature 0 = greedy. Lengths in tokens. `seed` makes the request repeatable whatever shares its batch."""

    max_tokens: int = 256
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    ignore_eos: bool = False  # go on after an end token: for benchmarks
    logprobs: bool = False  # keep log p of each token under temperature alone, before truncations and penalties

    def __post_init__(self) -> None:
        checks = {
            "max_tokens >= 1": self.max_tokens >= 1,
            "temperature >= 0": self.temperature >= 0,
            "top_k >= 0": self.top_k >= 0,
            "0 < top_p <= 1": 0 < self.top_p <= 1,
            "0 <= min_p <= 1": 0 <= self.min_p <= 1,
            "repetition_penalty > 0": self.repetition_penalty > 0,
            "stop strings are not empty": all(self.stop),
        }
        for rule, holds in checks.items():
            if not holds:
                raise ValueError(f"sampling needs {rule}; got {self}")
