"""Block lists: which key blocks each query block attends, and their other forms."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _core
from .arrays import is_torch, like, to_numpy
from .frozen import Frozen


def frame_blocks(frame_tokens: int, block: int) -> int:
    """Blocks of a frame: ``ceil(T / block)``."""
    return -(-frame_tokens // block)


class BlockList(Frozen):
    """The key blocks that each query block attends.

    Key blocks never straddle a frame: each frame of ``frame_tokens`` tokens is cut into
    ``ceil(T / block_k)`` blocks, the last one short. Query blocks are ``block_q`` consecutive rows.

    Attributes:
        indices: int32 ``[B, H, R, Kmax]``, ascending and unique within a row's count.
        counts: int32 ``[B, H, R]``, kept blocks of each row; 0 is an empty row.
        q_len: Lq, query tokens.
        k_len: Lk, key tokens; whole frames.
        frame_tokens: T.
        block_q: query rows that share a list, 16 to 128.
        block_k: tokens of a key block: 16, 32, 64 or 128.
        keep_frames: past frames that the frame stage used, or None for a list made otherwise.

    The values are checked where they are used: the CPU operators raise a ValueError that names
    the row; ``to_bool`` and ``density`` check ranges.
    """

    indices: Any
    counts: Any
    q_len: int
    k_len: int
    frame_tokens: int
    block_q: int
    block_k: int
    keep_frames: int | None

    def __init__(
        self, indices: Any, counts: Any, q_len: int, k_len: int, frame_tokens: int,
        block_q: int, block_k: int, keep_frames: int | None = None,
    ) -> None:  # fmt: skip
        """Check the geometry and the shapes."""
        super().__init__(
            indices=indices, counts=counts, q_len=q_len, k_len=k_len, frame_tokens=frame_tokens,
            block_q=block_q, block_k=block_k, keep_frames=keep_frames,
        )  # fmt: skip
        for name in ("q_len", "k_len", "frame_tokens", "block_q", "block_k"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise TypeError(f"{name}: expected an integer, got {value!r}")
            if value < 1:
                raise ValueError(f"{name}: expected 1 or more, got {value}")
        if not 16 <= self.block_q <= 128:
            raise ValueError(f"block_q: expected 16 to 128, got {self.block_q}")
        if self.block_k not in (16, 32, 64, 128):
            raise ValueError(f"block_k: expected 16, 32, 64 or 128, got {self.block_k}")
        if self.k_len % self.frame_tokens:
            raise ValueError(
                f"k_len: expected whole frames of {self.frame_tokens} tokens (frame_tokens), "
                f"got {self.k_len}"
            )
        shapes = [tuple(getattr(x, "shape", ())) for x in (self.indices, self.counts)]
        for name, shape, ndim in zip(("indices", "counts"), shapes, (4, 3), strict=True):
            if len(shape) != ndim:
                raise ValueError(f"{name}: expected {ndim} dimensions, got {len(shape)}")
        if shapes[0][:3] != shapes[1]:
            raise ValueError(
                f"counts: expected the first three sizes of indices, {shapes[0][:3]}, "
                f"got {shapes[1]}"
            )
        if shapes[1][2] != frame_blocks(self.q_len, self.block_q):
            raise ValueError(
                f"indices: expected R = {frame_blocks(self.q_len, self.block_q)} query blocks "
                f"(ceil(q_len / block_q)), got {shapes[1][2]}"
            )

    def __repr__(self) -> str:
        """The geometry, not the lists."""
        return (
            f"BlockList([B, H, R, Kmax] = {list(self.indices.shape)}, {self.q_len} queries in "
            f"blocks of {self.block_q}, {self.k_len} keys in frames of {self.frame_tokens} and "
            f"blocks of {self.block_k})"
        )

    def _row(self) -> tuple:
        """What the core takes."""
        return (
            self.indices, self.counts, self.q_len, self.k_len,
            self.frame_tokens, self.block_q, self.block_k,
        )  # fmt: skip

    @classmethod
    def full_rows(
        cls, indices: Any, q_len: int, k_len: int, frame_tokens: int, block_q: int, block_k: int,
        keep_frames: int | None = None,
    ) -> BlockList:  # fmt: skip
        """A list whose rows are all as long as ``indices`` is wide."""
        shape, kept = tuple(indices.shape[:3]), indices.shape[3]
        if is_torch(indices):
            counts = indices.new_full(shape, kept)
        else:
            counts = like(np.full(shape, kept, np.int32), indices)
        return cls(indices, counts, q_len, k_len, frame_tokens, block_q, block_k, keep_frames)

    @property
    def frames(self) -> int:
        """F, resident frames."""
        return self.k_len // self.frame_tokens

    @property
    def blocks(self) -> int:
        """J, key blocks: ``F * ceil(T / block_k)``."""
        return self.frames * frame_blocks(self.frame_tokens, self.block_k)

    @property
    def density(self) -> float:
        """Share of the (query, key) token pairs that are attended: ``1 - sparsity`` in tokens."""
        kept = self._numpy_bool()
        if kept.size == 0:
            return 0.0
        per_frame = np.full(frame_blocks(self.frame_tokens, self.block_k), self.block_k)
        per_frame[-1] = self.frame_tokens - self.block_k * (len(per_frame) - 1)
        rows = np.full(kept.shape[2], self.block_q)
        rows[-1] = self.q_len - self.block_q * (len(rows) - 1)
        keys = kept @ np.tile(per_frame, self.frames)  # [B, H, R] attended keys of a row
        pairs = kept.shape[0] * kept.shape[1] * self.q_len * self.k_len
        return float((keys * rows).sum() / pairs)

    def _numpy_bool(self) -> np.ndarray:
        return _core.lists_to_bool(
            to_numpy(self.indices, "indices"), to_numpy(self.counts, "counts"), self.blocks
        )

    def to_bool(self) -> Any:
        """Bool ``[B, H, R, J]``: True where the query block attends the key block."""
        return like(self._numpy_bool(), self.indices)

    def to_csr(self) -> tuple[Any, Any]:
        """``(indptr, indices)`` over the B * H * R rows: int64 ``[rows + 1]``, int32 ``[kept]``."""
        pair = _core.lists_to_csr(
            to_numpy(self.indices, "indices"), to_numpy(self.counts, "counts")
        )
        return tuple(like(x, self.indices) for x in pair)

    @classmethod
    def from_bool(
        cls, mask: Any, q_len: int, k_len: int, frame_tokens: int, block_q: int, block_k: int
    ) -> BlockList:
        """The list of a bool map ``[B, H, R, J]``; rows may be of any length, empty ones too."""
        kept = to_numpy(mask, "mask")
        indices, counts = _core.bool_to_lists(kept)
        made = cls(
            like(indices, mask), like(counts, mask), q_len, k_len, frame_tokens,
            block_q, block_k,
        )  # fmt: skip
        if kept.shape[3] != made.blocks:
            raise ValueError(f"mask: expected J = {made.blocks} key blocks, got {kept.shape[3]}")
        return made

    def to_flex(self) -> Any:
        """A ``torch.nn.attention.flex_attention.BlockMask`` of the same pattern.

        Where T is a multiple of ``block_k`` every listed block is a full block. Else flex's blocks
        straddle frames: those that a kept block touches are listed as partial ones, with a
        ``mask_mod`` that looks the token's own block up.

        Raises:
            ImportError: torch is not installed.
        """
        import torch
        from torch.nn.attention.flex_attention import BlockMask

        kept = torch.as_tensor(self.to_bool())
        tokens, per_frame = self.frame_tokens, frame_blocks(self.frame_tokens, self.block_k)
        block_q, block_k = self.block_q, self.block_k

        def mask_mod(b, h, q, k):
            return kept[b, h, q // block_q, k // tokens * per_frame + k % tokens // block_k]

        def ordered(flags):
            counts = flags.sum(-1, dtype=torch.int32)
            return counts, flags.to(torch.int8).argsort(dim=-1, descending=True, stable=True).int()

        if tokens % block_k == 0:
            nothing = ordered(torch.zeros_like(kept))
            lists = (*nothing, *ordered(kept))
        else:
            k = torch.arange(self.k_len, device=kept.device)
            own = k // tokens * per_frame + k % tokens // block_k  # each token's key block
            flex_blocks = frame_blocks(self.k_len, block_k)
            touched = torch.zeros(*kept.shape[:3], flex_blocks, dtype=torch.int32)
            touched = touched.to(kept.device).index_add_(3, k // block_k, kept[..., own].int())
            lists = ordered(touched > 0)
        return BlockMask.from_kv_blocks(
            *lists,
            BLOCK_SIZE=(block_q, block_k),
            mask_mod=mask_mod,
            seq_lengths=(self.q_len, self.k_len),
        )
