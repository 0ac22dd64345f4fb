"""A sparse call of a patched layer, its arguments checked once: pooling, selection, attention."""

import torch

from . import _core
from .blocks import BlockList, frame_blocks


class Step:
    """What :func:`lightforcing.attention` does, for calls of one kind, in one call of the core.

    Eager calls of a model are bound by the host: :func:`lightforcing.select_blocks` and
    :func:`lightforcing.block_sparse_attention` check twenty arguments and make five arrays a call,
    this checks them once and makes one, the result.
    """

    __slots__ = ("core", "shape", "dtype", "device", "dense", "words", "lists", "lse_shape",
                 "spare", "stream")  # fmt: skip

    def __init__(self, q, k, v, *, frame_tokens, sparsity, keep_frames, sink_frames, near_frames,
                 score, hierarchy, block_q, block_k, spare=None):  # fmt: skip
        """For calls with tensors like these, on the current stream.

        The keywords are :func:`select_blocks`', and a dict that several steps may share: it keeps
        the workspace of the last call on each stream for the next one.
        """
        self.core, kept, self.words = _core.plan_step(
            q, k, v, frame_tokens, sparsity, keep_frames, sink_frames, near_frames, score,
            hierarchy, block_q, block_k,
        )  # fmt: skip
        batch, q_len, heads, _ = q.shape
        self.shape, self.dtype, self.device = q.shape, q.dtype, q.device
        self.dense = q.is_contiguous()
        self.spare = {} if spare is None else spare
        self.stream = (
            self.device,
            torch.cuda.current_stream(self.device).cuda_stream if q.is_cuda else 0,
        )
        self.lse_shape = (batch, heads, q_len)
        self.lists = (
            (batch, heads, frame_blocks(q_len, block_q), kept),
            (q_len, k.shape[1], frame_tokens, block_q, block_k),
        )

    def run(self, q, k, v, means=None, held=0, want_lse=False, fresh=False):
        """Attend the chosen blocks.

        Args:
            q: as the one that the step was made for, up to its address.
            k: likewise.
            v: likewise.
            means: float32 ``[B, rows, H, D]`` with room for the means of all frames of k: block
                means for mean scores, else quarter-block means. None: pooled and forgotten.
            held: frames of ``means`` that hold; the others are pooled and written.
            want_lse: also return the log-sum-exp.
            fresh: take a new workspace, as a CUDA graph must, which may outlive what is spared.

        Returns:
            ``(out, lse or None, workspace)``; :meth:`blocks` reads the list in the workspace.
        """
        if self.dense:  # half the time of the other way
            out = torch.empty_like(q)
        else:
            out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        # Nobody else has it between pop and the end of the launches; later ones are behind them.
        workspace = None if fresh else self.spare.pop(self.stream, None)
        if workspace is None or workspace.shape[0] < self.words:
            workspace = torch.empty(self.words, dtype=torch.int32, device=self.device)
        lse = None
        if want_lse:
            lse = torch.empty(self.lse_shape, dtype=torch.float32, device=self.device)
        _core.sparse_step(self.core, q, k, v, out, workspace, means, held, lse)
        if not fresh:
            self.spare[self.stream] = workspace
        return out, lse, workspace

    def blocks(self, workspace):
        """The list of a run, which the next run may overwrite there: a copy."""
        shape, geometry = self.lists
        indices = workspace[: shape[0] * shape[1] * shape[2] * shape[3]].view(shape)
        return BlockList.full_rows(indices.clone(), *geometry)
