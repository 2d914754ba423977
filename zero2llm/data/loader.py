"""Batches for the loop: a deterministic order, an exact cursor, and a share for every rank.

Row number g of training (counted over all steps and epochs) is row ``g mod R`` of epoch ``g div R``, in an order
drawn from (seed, epoch). So the position in the data is one integer, an epoch's last rows share a batch with the
next epoch's first, and the global batch is the same for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator

from zero2llm.core.batch import Batch
from zero2llm.data.rows import Rows


class Loader:
    """Batches of ``rows`` rows per step over all ranks; this rank gets its contiguous part.

    repeat=True goes on for ever (training); False is one pass, whose last batch may be short (validation) and which
    every rank sees whole. Raises ValueError if the data cannot fill one batch, or rows do not divide among ranks.
    """

    def __init__(self, source: Rows, rows: int, *, seed: int, rank: int = 0, world: int = 1, repeat: bool = True):
        self.source, self.rows, self.seed, self.rank, self.world, self.repeat = source, rows, seed, rank, world, repeat
        self.units, self.step = rows // source.unit, 0
        assert 0 <= rank < world, (rank, world)
        if rows < 1 or rows % (source.unit * world):
            raise ValueError(
                f"a batch of {rows} rows does not divide among {world} ranks in groups of {source.unit}; change batch_tokens"
            )
        if repeat and len(source) < self.units:
            raise ValueError(
                f"the training data fills {len(source) * source.unit} rows, one batch needs {rows}: "
                "lower batch_tokens or seq_len, or give more data"
            )

    def __len__(self) -> int:
        """Batches in one epoch, the last one counted whole."""
        return -(-len(self.source) // self.units)

    def __iter__(self) -> Iterator[Batch]:
        n = len(self.source)
        while self.repeat or self.step * self.units < n:
            first, last = self.step * self.units, (self.step + 1) * self.units
            wanted = [(g // n, g % n) for g in range(first, last if self.repeat else min(last, n))]
            part = len(wanted) // self.world
            self.step += 1  # before the yield: the cursor points behind the batch that is being trained
            if self.repeat:
                wanted = wanted[self.rank * part : (self.rank + 1) * part]
            yield self.source.batch(wanted)

    def state_dict(self) -> dict:
        own = {"step": self.step, "seed": self.seed, "rows": self.rows, "units": len(self.source)}
        return own | self.source.identity

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError if the position belongs to other data, another seed, row length or batch."""
        own = self.state_dict()
        for key in [*own, *(key for key in state if key not in own)]:  # what only the other order has counts too
            if key != "step" and state.get(key) != own.get(key):
                raise ValueError(
                    f"cannot resume: the data's {key} was {state.get(key)} and is now {own.get(key)}; restore it or start anew"
                )
        self.step = state["step"]
