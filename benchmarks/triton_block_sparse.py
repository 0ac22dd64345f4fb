"""A plain Triton block-sparse attention: what a user would write in an afternoon, as a baseline.

One program for each list (128 query rows of a head) walks its kept key blocks of 64 tokens with
online softmax. Blocks restart at every frame, so the last one of a frame is short and masked.
Warps and stages are tuned once a head size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_Q, BLOCK_K = 128, 64
LOG2_E = 1.4426950408889634


@triton.autotune(
    configs=[triton.Config({}, num_warps=w, num_stages=s) for w in (4, 8) for s in (2, 3, 4)],
    key=["DIM"],
)
@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, out_ptr, indices_ptr, counts_ptr,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    out_batch, out_token, out_head,
    heads, q_len, frame_tokens, frame_blocks, width, scale_log2,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    tile, pair = tl.program_id(0), tl.program_id(1)
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    rows = tile * ROWS + tl.arange(0, ROWS)
    columns, keys = tl.arange(0, DIM), tl.arange(0, KEYS)
    inside = rows[:, None] < q_len
    row_offsets = rows.to(tl.int64)[:, None]
    q_at = q_ptr + batch * q_batch + head * q_head + row_offsets * q_token + columns[None, :]
    q = tl.load(q_at, mask=inside, other=0.0)
    k_base = k_ptr + batch * k_batch + head * k_head
    v_base = v_ptr + batch * v_batch + head * v_head
    entry = pair.to(tl.int64) * tl.num_programs(0) + tile
    count = tl.load(counts_ptr + entry)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, DIM], tl.float32)
    for i in range(0, count):
        block = tl.load(indices_ptr + entry * width + i)
        in_frame = block % frame_blocks * KEYS
        start = (block // frame_blocks * frame_tokens + in_frame).to(tl.int64)
        valid = keys < frame_tokens - in_frame
        token = start + keys
        k = tl.load(
            k_base + token[None, :] * k_token + columns[:, None], mask=valid[None, :], other=0.0
        )
        logits = tl.dot(q, k) * scale_log2
        logits = tl.where(valid[None, :], logits, -float("inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        p = tl.exp2(logits - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(
            v_base + token[:, None] * v_token + columns[None, :], mask=valid[:, None], other=0.0
        )
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None])
        top = new_top
    out = tl.where(total[:, None] > 0, out / total[:, None], 0.0)
    out_at = out_ptr + batch * out_batch + head * out_head
    out_at += row_offsets * out_token + columns[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=inside)


def attend(q, k, v, blocks):
    """Attention over a BlockList of 128-row lists and 64-token key blocks.

    Args:
        q: ``[B, Lq, H, D]`` bfloat16 or float16, D 64 or 128, last stride 1.
        k: ``[B, Lk, H, D]``.
        v: ``[B, Lk, H, D]``.
        blocks: the lists; empty ones give zeros.

    Returns:
        ``[B, Lq, H, D]``, contiguous.
    """
    if (blocks.block_q, blocks.block_k) != (BLOCK_Q, BLOCK_K):
        raise ValueError(f"blocks: expected {BLOCK_Q} x {BLOCK_K}, got {blocks.block_q} x "
                         f"{blocks.block_k}")  # fmt: skip
    batch, q_len, heads, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    strides = [x.stride(i) for x in (q, k, v, out) for i in range(3)]
    _attend[(triton.cdiv(q_len, BLOCK_Q), batch * heads)](
        q, k, v, out, blocks.indices, blocks.counts, *strides,
        heads, q_len, blocks.frame_tokens, -(-blocks.frame_tokens // BLOCK_K),
        blocks.indices.shape[3], dim**-0.5 * LOG2_E,
        ROWS=BLOCK_Q, KEYS=BLOCK_K, DIM=dim,
    )  # fmt: skip
    return out
