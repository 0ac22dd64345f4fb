"""The selectors that select_blocks is: Light Forcing's HSA, mean, mass and log-sum-exp scores."""

from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

from .. import ops
from .base import Geometry
from .rank import as_torch, counts_on, top


class _Builtin:
    needs_grid = False
    exact = True
    score = "mean"

    def select(self, q: Any, k: Any, geometry: Geometry) -> Any:
        """:func:`lightforcing.select_blocks` with the geometry's count."""
        if geometry.kept_by_head is None:
            return self._run(q, k, geometry)
        scores = self._run(q, k, geometry, return_scores=True)[1]
        return top(as_torch(scores), geometry, q)

    def _run(self, q, k, geometry, hierarchy=False, **more):
        # The middle of the interval of sparsities that keep this many blocks.
        sparsity = 1 - min(geometry.kept + 0.5, geometry.blocks) / geometry.blocks
        return ops.select_blocks(
            q,
            k,
            frame_tokens=geometry.frame_tokens,
            sparsity=sparsity,
            score=self.score,
            hierarchy=hierarchy,
            block_q=geometry.block_q,
            block_k=geometry.block_k,
            scale=geometry.scale,
            **more,
        )


@dataclass(frozen=True)
class Mean(_Builtin):
    """Top blocks by the product of mean query and mean key: SLA's selector, 1-D block top-k."""

    name: ClassVar[str] = "mean"
    notes: ClassVar[str] = (
        "SLA (arXiv 2509.24006) without its linear branch, which is 0 before training; centring "
        "the keys, as it does, cannot change a row's ranking."
    )


@dataclass(frozen=True)
class Lse(_Builtin):
    """Top blocks by the log-sum-exp over the 4 x 4 pairs of sub-block means."""

    score: ClassVar[str] = "lse"
    name: ClassVar[str] = "lse"
    notes: ClassVar[str] = "The logits of mass without its softmax over all blocks."


@dataclass(frozen=True)
class Mass(_Builtin):
    """Top blocks by the attention mass that sub-block means predict.

    Attributes:
        guarantee: share of the kept slots that goes to the best blocks of the forced frames before
            all blocks compete for the rest, in [0, 1].
        sink_frames: first frames that are forced.
        near_frames: last past frames that are forced.
        current: are the chunk's own frames forced, too?
    """

    guarantee: float = 0.0
    sink_frames: int = 1
    near_frames: int = 2
    current: bool = False

    score: ClassVar[str] = "mass"
    name: ClassVar[str] = "mass"
    notes: ClassVar[str] = "Ours."

    def __post_init__(self):
        """Check the share."""
        if not isinstance(self.guarantee, Real) or not 0 <= self.guarantee <= 1:
            raise ValueError(f"guarantee: expected a share in [0, 1], got {self.guarantee!r}")

    def select(self, q, k, geometry):
        """With a guarantee, the forced frames' best blocks first."""
        if self.guarantee == 0:
            return super().select(q, k, geometry)
        import torch

        scores = as_torch(self._run(q, k, geometry, return_scores=True)[1])
        frame = torch.arange(geometry.blocks, device=scores.device) // geometry.per_frame
        forced = frame < self.sink_frames
        forced |= (frame >= geometry.past - self.near_frames) & (frame < geometry.past)
        if self.current:
            forced |= frame >= geometry.past
        slots = int(self.guarantee * geometry.kept)
        if geometry.kept_by_head is not None:
            slots = tuple(int(self.guarantee * n) for n in geometry.kept_by_head)
            slots = counts_on(slots, scores.device)[:, None, None]
        among = scores.masked_fill(~forced, -torch.inf).sort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(among.indices)
        rank.scatter_(
            -1, among.indices, torch.arange(len(frame), device=rank.device).expand_as(rank)
        )
        first = forced & (rank < slots)
        return top(scores.masked_fill(first, torch.inf), geometry, q)


@dataclass(frozen=True)
class Hsa(_Builtin):
    """Frames first, then blocks inside them, by mean scores: the paper's rule.

    Attributes:
        keep_frames: past frames that stay candidates of a query block.
        sink_frames: first frames that always are among them.
        near_frames: last past frames that always are among them.
        score: of blocks and frames: ``mean`` (the paper's), ``mass`` or ``lse``.
    """

    keep_frames: int = 6
    sink_frames: int = 1
    near_frames: int = 2
    score: str = "mean"

    name: ClassVar[str] = "hsa"
    notes: ClassVar[str] = (
        "Light Forcing (arXiv 2602.04789); blocks restart at every frame, means in float32."
    )

    def select(self, q, k, geometry):
        """:func:`lightforcing.select_blocks` with a frame stage.

        Raises:
            ValueError: the geometry has counts by head, which a frame stage does not support.
        """
        if geometry.kept_by_head is not None:
            raise ValueError("budget: expected a selector without a frame stage, got hsa")
        frames = {"keep_frames": self.keep_frames, "sink_frames": self.sink_frames,
                  "near_frames": self.near_frames}  # fmt: skip
        return self._run(q, k, geometry, hierarchy=True, **frames)
