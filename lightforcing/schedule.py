"""Chunk-aware growth (CAG): how sparse each chunk of a video may be.

Source: Light Forcing (arXiv 2602.04789), section CAG; clipping with a re-solve, the count law and
open-ended streaming are ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from . import _core
from .frozen import Frozen

MOST_FRAMES = 10_000_000  # a week of video; longer streams go on past their plan
LAWS = ("linear", "exponential", "constant", "count")


def _integer(value: object, name: str, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < low:
        raise ValueError(f"{name}: expected {low} or more, got {value}")
    return int(value)


def _ends(
    num_frames: int | None,
    frames_per_chunk: int,
    chunk_ends: Sequence[int] | None,
    window: int | None,
) -> np.ndarray:
    """Frames of the video once each chunk exists, int64."""
    if chunk_ends is not None:
        ends = np.asarray(chunk_ends)
        if ends.ndim != 1 or ends.size == 0 or ends.dtype.kind not in "iu":
            raise ValueError(f"chunk_ends: expected a list of integers, got {chunk_ends!r}")
        return np.ascontiguousarray(ends, np.int64)
    if num_frames is None:
        num_frames = 63 if window else 21
    num_frames = _integer(num_frames, "num_frames", 1)
    if num_frames > MOST_FRAMES:
        raise ValueError(f"num_frames: expected 1 to {MOST_FRAMES}, got {num_frames}")
    ends = list(range(frames_per_chunk, num_frames + 1, frames_per_chunk))
    if not ends or ends[-1] < num_frames:
        ends.append(num_frames)
    return np.array(ends, np.int64)


class Schedule(Frozen):
    """The solved sparsity of every chunk, and its continuation past the plan.

    Attributes:
        sparsity: float64 ``[chunks]``, share of key blocks not attended.
        chunk_ends: int64 ``[chunks]``, frames of the video once the chunk exists.
        frames_per_chunk: f, for calls that know only their first frame.
        window: resident frames at most, or None.
        dense_frames: calls with fewer frames before them are dense.
        law: ``linear``, ``exponential``, ``constant``, ``count`` or ``given``.
        target: the mean sparsity asked for; None for given values.
        solved: beta (linear, exponential), the target (constant), kept frames (count).
    """

    sparsity: np.ndarray
    chunk_ends: np.ndarray
    frames_per_chunk: int
    window: int | None
    dense_frames: int
    law: str
    target: float | None
    solved: float

    def __init__(
        self, sparsity: np.ndarray, chunk_ends: np.ndarray, frames_per_chunk: int,
        window: int | None, dense_frames: int, law: str, target: float | None, solved: float,
    ) -> None:  # fmt: skip
        """Made by :meth:`solve` and :meth:`given`."""
        for handed_out in sparsity, chunk_ends:  # and cached, so nobody may write into them
            handed_out.setflags(write=False)
        super().__init__(
            sparsity=sparsity, chunk_ends=chunk_ends, frames_per_chunk=frames_per_chunk,
            window=window, dense_frames=dense_frames, law=law, target=target, solved=solved,
        )  # fmt: skip

    @classmethod
    def solve(
        cls,
        num_frames: int | None = 21,
        frames_per_chunk: int = 3,
        *,
        sparsity: float = 0.80,
        base: float | None = None,
        window: int | None = None,
        law: str = "linear",
        chunk_ends: Sequence[int] | None = None,
        dense_frames: int | None = None,
    ) -> Schedule:
        """Solve the law for a video; arguments as :func:`cag_schedule`."""
        frames_per_chunk = _integer(frames_per_chunk, "frames_per_chunk", 1)
        if window is not None:
            window = _integer(window, "window", 1)
        dense = frames_per_chunk if dense_frames is None else dense_frames
        dense = _integer(dense, "dense_frames", 0)
        ends = _ends(num_frames, frames_per_chunk, chunk_ends, window)
        if base is None:
            try:
                base = min(1.0, sparsity + 0.10)
            except TypeError:
                raise TypeError(f"sparsity: expected a number, got {sparsity!r}") from None
        values, solved = _core.cag_schedule(ends, dense, window or 0, sparsity, base, law)
        return cls(values, ends, frames_per_chunk, window, dense, law, float(sparsity), solved)

    @classmethod
    def given(
        cls,
        values: Sequence[float],
        frames_per_chunk: int = 3,
        *,
        window: int | None = None,
        chunk_ends: Sequence[int] | None = None,
        dense_frames: int | None = None,
    ) -> Schedule:
        """A schedule of values taken as they are, one for each chunk from the first.

        Args:
            values: sparsities in [0, 1).
            frames_per_chunk: f; chunk c ends at frame ``(c + 1) * f`` unless ``chunk_ends`` says.
            window: resident frames at most; only reported.
            chunk_ends: frames of the video once each chunk exists.
            dense_frames: calls with fewer frames before them are dense; default 0, so that the
                values alone decide (the first chunk has nothing to select from anyway).
        """
        array = np.array(values, np.float64)
        if array.ndim != 1 or array.size == 0:
            raise ValueError(f"schedule: expected a list of numbers, got {values!r}")
        if not ((array >= 0) & (array < 1)).all():
            raise ValueError(f"schedule: expected numbers in [0, 1), got {values!r}")
        frames_per_chunk = _integer(frames_per_chunk, "frames_per_chunk", 1)
        ends = _ends(frames_per_chunk * array.size, frames_per_chunk, chunk_ends, window)
        if ends.size != array.size:
            raise ValueError(
                f"chunk_ends: expected one for each of the {array.size} values, got {ends.size}"
            )
        dense = _integer(dense_frames or 0, "dense_frames", 0)
        return cls(array, ends, frames_per_chunk, window, dense, "given", None, float("nan"))

    def at(self, n: int) -> float:
        """Sparsity of a call with ``n = first query frame + frames_per_chunk``.

        The first planned chunk that reaches n answers. Past the plan the last value holds, for
        ``count`` the kept number of frames instead, with resident frames ``min(n, window)``.
        0 where fewer than ``dense_frames`` frames come before.
        """
        if n - self.frames_per_chunk < self.dense_frames:
            return 0.0
        last = int(self.chunk_ends[-1])
        if n - self.frames_per_chunk < last < n:
            n = last  # a short last chunk
        place = int(np.searchsorted(self.chunk_ends, n))
        if place < self.sparsity.size:
            return float(self.sparsity[place])
        return self._past_the_plan(n)

    def _past_the_plan(self, n: int) -> float:
        starts = np.concatenate([[0], self.chunk_ends[:-1]])
        budgeted = (starts >= self.dense_frames) & (starts > 0)
        if self.law == "given" or budgeted.any():
            if self.law != "count" or self.target == 0:
                return float(self.sparsity[-1])
            resident = min(n, self.window) if self.window else n
            return max(0.0, 1.0 - self.solved / resident)
        return float(self.target)  # nothing but dense chunks was planned


def cag_schedule(
    num_frames: int | None = 21,
    frames_per_chunk: int = 3,
    *,
    sparsity: float = 0.80,
    base: float | None = None,
    window: int | None = None,
    law: str = "linear",
    chunk_ends: Sequence[int] | None = None,
    dense_frames: int | None = None,
) -> np.ndarray:
    """Sparsity of every chunk of a video, such that their mean is ``sparsity``.

    ``linear``: ``s_c = clip(base - beta / sqrt(n_c), 0, 1)`` with n_c the frames of the video once
    chunk c exists, and beta such that the mean of s_c over the chunks that are not dense, weighted
    by their resident frames ``min(n_c, window)``, is ``sparsity``. ``exponential``:
    ``clip(base - 1 + exp(-beta / sqrt(n_c)))``. ``constant``: ``sparsity`` everywhere. ``count``:
    the same number of kept blocks for every chunk, ``clip(1 - kept / min(n_c, window))``.

    Args:
        num_frames: latent frames of the video; None plans 21 without a window and 63 with one. A
            last chunk may be short.
        frames_per_chunk: latent frames of a chunk.
        sparsity: the mean share of key blocks not attended, in [0, 1); 0 gives all zeros.
        base: what late chunks tend to, from ``sparsity`` to 1; None is ``min(1, sparsity + 0.10)``.
            ``count`` ignores it.
        window: resident frames at most (a local attention window), or None.
        law: ``linear``, ``exponential``, ``constant`` or ``count``.
        chunk_ends: frames of the video once each chunk exists, in place of ``num_frames``: ``(1, 4,
            7)`` for a lone first frame.
        dense_frames: chunks with fewer frames before them are dense and outside the budget;
            default ``frames_per_chunk``. The first chunk always is.

    Returns:
        float64 ``[chunks]``.

    Raises:
        ValueError: a number is out of range; the sentence says which.
        TypeError: a value is of the wrong kind.

    Source: Light Forcing (arXiv 2602.04789), CAG. Differs: clipped with a re-solve; ``count``.
    Reference: :func:`lightforcing.reference.cag_schedule`.
    """
    return Schedule.solve(
        num_frames, frames_per_chunk, sparsity=sparsity, base=base, window=window, law=law,
        chunk_ends=chunk_ends, dense_frames=dense_frames,
    ).sparsity.copy()  # fmt: skip
