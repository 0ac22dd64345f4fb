"""Another number of key blocks for every head, the total unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Budget:
    """What share of the schedule's blocks each head of each layer gets.

    Attributes:
        shares: ``[layers][heads]``, 0 or more; only their ratios matter. All equal is no change.

    Raises:
        ValueError: the table is ragged, empty or negative, or sums to 0.
    """

    shares: tuple[tuple[float, ...], ...]

    def __post_init__(self):
        """Check, and make tuples."""
        try:
            table = np.array(self.shares, np.float64)
        except (TypeError, ValueError):
            table = np.zeros(0)
        good = table.ndim == 2 and table.size and (table >= 0).all() and 0 < table.sum() < np.inf
        if not good:
            raise ValueError(
                "shares: expected [layers][heads] numbers of at least 0, not all 0, "
                f"got {self.shares!r}"
            )
        object.__setattr__(self, "shares", tuple(map(tuple, table.tolist())))

    def counts(self, kept: int, blocks: int) -> np.ndarray:
        """int64 ``[layers, heads]``: blocks of every head, 1 to ``blocks``, mean ``kept``.

        Largest remainders, ties to the lower layer and head; what a full head cannot take goes to
        the others by their shares.
        """
        if not 1 <= kept <= blocks:
            raise ValueError(f"kept: expected 1 to {blocks} blocks, got {kept}")
        return _counts(self, kept, blocks)

    @classmethod
    def from_errors(
        cls, errors: Sequence, counts: Sequence[int], kept: int, floor: int = 1
    ) -> Budget:
        """The shares that make the sum of the errors least at a mean of ``kept`` blocks.

        One step of one head after the other: always that which lowers its error most for a block.

        Args:
            errors: ``[layers, heads, n]``, the output error of a head at each of ``counts``.
            counts: n ascending numbers of kept blocks.
            kept: mean over all heads of what may be kept.
            floor: no head gets less.

        Raises:
            ValueError: shapes disagree, or no head can have ``kept`` on average.
        """
        table, steps = np.asarray(errors, np.float64), np.asarray(counts, np.int64)
        if table.ndim != 3 or steps.ndim != 1 or table.shape[2] != steps.size or steps.size < 2:
            raise ValueError(
                "errors: expected [layers, heads, n] and n >= 2 counts, "
                f"got {list(table.shape)} and {list(steps.shape)}"
            )
        if (np.diff(steps) <= 0).any() or steps[0] < 1:
            raise ValueError(f"counts: expected ascending numbers from 1, got {steps.tolist()}")
        heads = table.reshape(-1, steps.size)
        place = np.full(len(heads), int(np.searchsorted(steps, floor)))
        left = kept * len(heads) - int(steps[np.minimum(place, steps.size - 1)].sum())
        if left < 0 or floor > steps[-1]:
            raise ValueError(f"kept: expected at least the lowest count, {floor}, got {kept}")
        gain, to = _slopes(heads, steps, place, left)
        while gain.max() > 0:
            head = int(gain.argmax())
            left -= int(steps[to[head]] - steps[place[head]])
            place[head] = to[head]
            gain, to = _slopes(heads, steps, place, left)
        return cls(tuple(map(tuple, steps[place].reshape(table.shape[:2]).tolist())))


def _slopes(heads, steps, place, left):
    """The steepest fall of error for a block that each head can still afford, and where to."""
    cost = steps[None, :] - steps[place][:, None]
    fall = heads[np.arange(len(heads)), place][:, None] - heads
    slope = np.where((cost > 0) & (cost <= left), fall / np.maximum(cost, 1), -np.inf)
    to = slope.argmax(1)
    return slope[np.arange(len(heads)), to], to


@lru_cache(maxsize=256)
def _counts(budget: Budget, kept: int, blocks: int) -> np.ndarray:
    shares = np.array(budget.shares)
    # A head without a share still fills up once all others are full.
    flat, total = np.maximum(shares.ravel() / shares.max(), 1e-9), kept * shares.size
    low, high = 0.0, blocks * 1e9
    for _ in range(200):
        middle = (low + high) / 2
        few = np.clip(middle * flat, 1, blocks).sum() < total
        low, high = (middle, high) if few else (low, middle)
    due = np.clip(high * flat, 1, blocks)
    counts = np.floor(due + 1e-6).astype(np.int64)
    order = np.argsort(counts - due, kind="stable")
    order = order[counts[order] < blocks]
    counts[order[: total - counts.sum()]] += 1
    counts = counts.reshape(shares.shape)
    counts.setflags(write=False)
    return counts
