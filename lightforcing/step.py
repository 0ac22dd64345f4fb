"""A sparse call of a patched layer, its arguments checked once: pooling, selection, attention."""

import torch

from . import _core
from .blocks import BlockList, frame_blocks


class Step:
    """What :func:`lightforcing.attention` does, for calls of one kind, in one call of the core.

    Eager calls of a model are bound by the host: :func:`lightforcing.select_blocks` and
    :func:`lightforcing.block_sparse_attention` check twenty arguments and make five arrays a call,
    this checks them once and makes two.
    """

    __slots__ = ("core", "shape", "dtype", "device", "words", "lists", "lse_shape")

    def __init__(self, q, k, v, *, frame_tokens, sparsity, keep_frames, sink_frames, near_frames,
                 score, hierarchy, block_q, block_k):  # fmt: skip
        """For calls with tensors like these; the keywords are :func:`select_blocks`'."""
        self.core, kept, self.words = _core.plan_step(
            q, k, v, frame_tokens, sparsity, keep_frames, sink_frames, near_frames, score,
            hierarchy, block_q, block_k,
        )  # fmt: skip
        batch, q_len, heads, _ = q.shape
        self.shape, self.dtype, self.device = q.shape, q.dtype, q.device
        self.lse_shape = (batch, heads, q_len)
        self.lists = (
            (batch, heads, frame_blocks(q_len, block_q), kept),
            (q_len, k.shape[1], frame_tokens, block_q, block_k),
        )

    def run(self, q, k, v, means=None, held=0, want_lse=False):
        """Attend the chosen blocks.

        Args:
            q: as the one that the step was made for, up to its address.
            k: likewise.
            v: likewise.
            means: float32 ``[B, rows, H, D]`` with room for the means of all frames of k: block
                means for mean scores, else quarter-block means. None: pooled and forgotten.
            held: frames of ``means`` that hold; the others are pooled and written.
            want_lse: also return the log-sum-exp.

        Returns:
            ``(out, lse or None, workspace)``; :meth:`blocks` reads the list in the workspace.
        """
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        workspace = torch.empty(self.words, dtype=torch.int32, device=self.device)
        lse = None
        if want_lse:
            lse = torch.empty(self.lse_shape, dtype=torch.float32, device=self.device)
        _core.sparse_step(self.core, q, k, v, out, workspace, means, held, lse)
        return out, lse, workspace

    def blocks(self, workspace):
        """The list of a run, a view of its workspace."""
        shape, geometry = self.lists
        indices = workspace[: shape[0] * shape[1] * shape[2] * shape[3]].view(shape)
        return BlockList.full_rows(indices, *geometry)
