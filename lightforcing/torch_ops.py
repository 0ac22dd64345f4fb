"""The operators as ``torch.ops.lightforcing.*``, for ``torch.compile`` and friends.

Eager calls go straight to the C core (see :mod:`lightforcing.ops`): a registered operator costs
microseconds of dispatch. Under a compiler the same Python functions call these instead, which have
fake kernels (shapes only) and are opaque, functional nodes of the graph.
"""

from __future__ import annotations

import torch

from . import _core
from .arrays import allocator, is_dual, stream_of
from .blocks import BlockList

_LIBRARY = torch.library.Library("lightforcing", "DEF")
_SCHEMAS = (
    "compress(Tensor x, SymInt frame_tokens, int block) -> Tensor",
    "select_blocks(Tensor q, Tensor k, Tensor? k_means, SymInt frame_tokens, float sparsity, "
    "int keep_frames, int sink_frames, int near_frames, str score, bool hierarchy, int block_q, "
    "int block_k, float? scale) -> Tensor",
    "block_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor? indices, Tensor? counts, "
    "SymInt frame_tokens, int block_q, int block_k, float? scale) -> (Tensor, Tensor)",
)


def _compress(x, frame_tokens, block):
    return _core.compress(x, None, allocator(x), frame_tokens, block, stream_of(x))


def _compress_fake(x, frame_tokens, block):
    batch, tokens, heads, dim = x.shape
    per_frame = (frame_tokens + block - 1) // block
    shape = (batch, tokens // frame_tokens * per_frame, heads, dim)
    return x.new_empty(shape, dtype=torch.float32)


def _select_blocks(
    q, k, k_means, frame_tokens, sparsity, keep_frames, sink_frames, near_frames, score,
    hierarchy, block_q, block_k, scale,
):  # fmt: skip
    return _core.select_blocks(
        q, k, k_means, allocator(q), frame_tokens, sparsity, keep_frames, sink_frames,
        near_frames, score, hierarchy, block_q, block_k, scale, False, stream_of(q),
    )[0]  # fmt: skip


def _select_blocks_fake(
    q, k, k_means, frame_tokens, sparsity, keep_frames, sink_frames, near_frames, score,
    hierarchy, block_q, block_k, scale,
):  # fmt: skip
    q_frames, k_frames = int(q.shape[1] // frame_tokens), int(k.shape[1] // frame_tokens)
    _, kept, _ = _core.select_plan(
        q_frames, k_frames, int(frame_tokens), block_k, sparsity, keep_frames, hierarchy
    )
    rows = (q.shape[1] + block_q - 1) // block_q
    return q.new_empty((q.shape[0], q.shape[2], rows, kept), dtype=torch.int32)


def _block_sparse_attention(q, k, v, indices, counts, frame_tokens, block_q, block_k, scale):
    rows = None
    if indices is not None:
        rows = (indices, counts, q.shape[1], k.shape[1], frame_tokens, block_q, block_k)
    return _core.block_sparse_attention(
        q, k, v, rows, None, allocator(q), scale, True, stream_of(q)
    )


def _block_sparse_attention_fake(q, k, v, indices, counts, frame_tokens, block_q, block_k, scale):
    batch, tokens, heads, _ = q.shape
    lse = q.new_empty((batch, heads, tokens), dtype=torch.float32)
    return q.new_empty(q.shape), lse


def _no_gradient(operator):
    def run(*args):
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            raise ValueError(
                f"{operator.__name__}: expected tensors without grad; lightforcing is for "
                "inference: call it under torch.no_grad() or detach first"
            )
        if any(is_dual(x) for x in tensors):
            raise ValueError(
                f"{operator.__name__}: expected tensors without a forward-mode tangent, got a dual "
                "tensor; lightforcing is for inference"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    return run


def _register():
    kernels = (
        (_compress, _compress_fake),
        (_select_blocks, _select_blocks_fake),
        (_block_sparse_attention, _block_sparse_attention_fake),
    )
    for schema, (kernel, fake) in zip(_SCHEMAS, kernels, strict=True):
        name = schema.split("(")[0]
        _LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, kernel, key)
        _LIBRARY.impl(name, _no_gradient(getattr(torch.ops.lightforcing, name)), "Autograd")
        torch.library.register_fake(f"lightforcing::{name}", fake, lib=_LIBRARY)


_register()


# ---- what lightforcing.ops calls while a compiler traces --------------------------------------


def traced_compress(x, frame_tokens, block, out):
    """:func:`lightforcing.compress` as a node of the graph."""
    means = torch.ops.lightforcing.compress(x, frame_tokens, block)
    return means if out is None else out.copy_(means)


def traced_select_blocks(
    q, k, k_means, frame_tokens, sparsity, keep_frames, sink_frames, near_frames, score,
    hierarchy, block_q, block_k, scale, return_scores,
):  # fmt: skip
    """:func:`lightforcing.select_blocks` as a node of the graph."""
    if return_scores:
        raise NotImplementedError("return_scores: expected False under torch.compile, got True")
    indices = torch.ops.lightforcing.select_blocks(
        q, k, k_means, frame_tokens, sparsity, keep_frames, sink_frames, near_frames, score,
        hierarchy, block_q, block_k, scale,
    )  # fmt: skip
    return BlockList.full_rows(indices, q.shape[1], k.shape[1], frame_tokens, block_q, block_k)


def traced_block_sparse_attention(q, k, v, blocks, scale, return_lse, out):
    """:func:`lightforcing.block_sparse_attention` as a node of the graph."""
    if blocks is None:
        rows = (None, None, 1, 128, 64)
    else:
        rows = (
            blocks.indices, blocks.counts, blocks.frame_tokens, blocks.block_q, blocks.block_k
        )  # fmt: skip
    result, lse = torch.ops.lightforcing.block_sparse_attention(q, k, v, *rows, scale)
    if out is not None:
        result = out.copy_(result)
    return (result, lse) if return_lse else result
