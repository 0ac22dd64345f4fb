"""Radial Attention (arXiv 2506.19852): bands of tokens that halve as the frame distance doubles."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .base import token_places
from .rank import Static
from .tiles import pieces

LATE = 1e6  # costs of blocks in frames that the source skips: after all others


@dataclass(frozen=True)
class Radial(Static):
    """A band |query token - key token| <= width(d) in each key frame at distance d.

    The source's rule for Wan: with L(d) = 2^bits(T) / 2^bits(d), the whole own frame, T // 2 at
    d = 1, else max(L decay, block); where L < ``split`` only distances divisible by split / L; the
    first frame of the video whole. A key block stays when more than 60 % of its columns that hold
    anything are more than a third full.

    Attributes:
        decay: factor on the width of all bands but the nearest; 0.2 in the source's Wan scripts.
        split: width below which frames are skipped; None is two blocks (128 tokens at 64, as in
            the source).
        fit: meet the schedule's count by another decay: the nearest frames and the first one as
            above if they fit, else bands too, widths L(d) decay everywhere and L(1) for the first
            frame; skipped frames last. False takes the rule as given.
    """

    decay: float = 0.2
    split: int | None = None
    fit: bool = True

    name: ClassVar[str] = "radial"
    notes: ClassVar[str] = (
        "Decay fitted to the budget; where the nearest frames and the first one alone exceed it, "
        "they are cut to bands as well, since the published rule cannot get so sparse."
    )
    needs_grid: ClassVar[bool] = False

    @property
    def exact(self):
        """Only a fitted decay keeps the schedule's count."""
        return self.fit

    def costs(self, geometry, heads):
        """The decay at which a block first stays; below 0 what always stays."""
        parts, distance, length, skipped, sink = self._bands(geometry)
        need = self._needs(geometry, parts)  # [pieces, blocks of a frame]
        per_frame = geometry.per_frame
        late = np.where(skipped, LATE, 0) + 1e-6 * distance  # of equals the nearer frame
        cost = need[:, None, :] / length[:, :, None] + late[:, :, None]
        always = np.broadcast_to((distance == 0) | sink, distance.shape)[:, :, None] | (
            (distance == 1)[:, :, None] & (need[:, None, :] <= geometry.frame_tokens // 2)
        )
        cost = cost.reshape(len(parts), -1)
        always = np.broadcast_to(always, (len(parts), geometry.k_frames, per_frame))
        always = always.reshape(len(parts), -1)
        row = np.array([p[0] for p in parts])
        first = np.flatnonzero(np.diff(row, prepend=-1))
        cost = np.minimum.reduceat(cost, first)
        always = np.logical_or.reduceat(always, first)
        kept = geometry.kept if geometry.kept_by_head is None else geometry.kept_by_head
        fits = always.sum(1, keepdims=True) <= np.reshape(kept, (-1, 1, 1))  # [H or 1, R, 1]
        return np.where(always & fits, cost - 2 * LATE, cost)

    def own(self, geometry):
        """The rule as given; None with ``fit``."""
        if self.fit:
            return None
        parts, distance, length, skipped, sink = self._bands(geometry)
        tokens = geometry.frame_tokens
        width = np.maximum(np.floor(length * self.decay), geometry.block_k)
        width = np.where(distance == 1, tokens // 2, width)
        width = np.where((distance == 0) | sink, tokens, width).astype(np.int64)
        kept = np.zeros((geometry.rows, geometry.k_frames, geometry.per_frame), bool)
        for size in np.unique(width):
            mask = self._within(geometry, parts, size)  # [pieces, blocks of a frame]
            for at, (row, *_) in enumerate(parts):
                use = (width[at] == size) & ~skipped[at]
                kept[row, use] |= mask[at]
        return kept.reshape(geometry.rows, -1)

    def _bands(self, geometry):
        """The pieces; and for each with each key frame distance, L, skipped, first of the video."""
        parts = pieces(geometry)
        ages = geometry.ages
        query = ages[geometry.past :][[p[1] for p in parts]]
        distance = np.abs(query[:, None] - ages[None, :])
        bits = np.ceil(np.log2(distance + 1)).astype(np.int64)
        length = 2.0 ** (geometry.frame_tokens.bit_length() - bits)
        first = geometry.past if geometry.first_frame is None else geometry.first_frame
        sink = (ages == first + geometry.q_frames - 1)[None, :]
        split = 2 * geometry.block_k if self.split is None else self.split
        every = np.maximum(1, np.floor(split / length)).astype(np.int64)
        skipped = (length < split) & (distance % every != 0) & ~sink
        length = np.where(sink, np.maximum(length, length[distance == 1].max(initial=1)), length)
        return parts, distance, length, skipped, np.broadcast_to(sink, distance.shape)

    def _distances(self, geometry, parts):
        """|row - column| in raster order for the rows of each piece and all tokens of a frame."""
        if geometry.order == "raster":
            place = np.arange(geometry.frame_tokens)
        else:
            place = token_places(*geometry.grid, geometry.order) @ (geometry.grid[1], 1)
        for _, _, begin, end in parts:
            yield np.abs(place[begin:end, None] - place[None, :])

    def _needs(self, geometry, parts):
        """Width of the band at which a block holds more than 60 % columns a third full."""
        block, per_frame = geometry.block_k, geometry.per_frame
        sizes = np.full(per_frame, block)
        sizes[-1] = geometry.frame_tokens - block * (per_frame - 1)
        pick = (sizes * 6 // 10)[:, None]
        out = np.empty((len(parts), per_frame))
        padded = np.full(per_frame * block, np.inf)
        for at, far in enumerate(self._distances(geometry, parts)):
            third = len(far) // 3
            padded[: far.shape[1]] = np.partition(far, third, axis=0)[third]
            columns = np.sort(padded.reshape(per_frame, block), axis=1)
            out[at] = np.take_along_axis(columns, pick, 1)[:, 0]
        return out

    def _within(self, geometry, parts, width):
        """Does the source keep a block of a band of this width? Bool [pieces, blocks]."""
        starts = np.arange(0, geometry.frame_tokens, geometry.block_k)
        out = np.empty((len(parts), len(starts)), bool)
        for at, far in enumerate(self._distances(geometry, parts)):
            share = (far <= width).mean(0)
            full = np.add.reduceat(share > 1 / 3, starts, dtype=np.int64)
            some = np.add.reduceat(share > 0, starts, dtype=np.int64)
            out[at] = full > 0.6 * some
        return out
