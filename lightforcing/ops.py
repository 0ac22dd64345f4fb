"""The operators: name the allocator, call the core. One function each.

Tensors are ``[B, L, H, D]``: batch, tokens, heads, head size. They may be torch tensors, NumPy
arrays or anything with ``__dlpack__``; batch, token and head strides are free, the last stride
is 1. Results are of the input's kind. Inference only: an input that needs grad raises.
"""

from __future__ import annotations

from typing import Any

from . import _core
from .arrays import allocator, compiling, like, ready, stream_of, writable
from .blocks import BlockList

Tensor = Any  # torch.Tensor, numpy.ndarray or another DLPack producer


def compress(x: Tensor, frame_tokens: int, *, block: int = 64, out: Tensor | None = None) -> Tensor:
    """Float32 means of the key blocks of every frame.

    ``out[b, j, h] = mean of x[b, tokens of block j, h]``, where each frame is cut into
    ``ceil(T / block)`` blocks, the last one short. A mean is by definition the token-weighted sum
    of its quarter blocks' means, in ascending order, divided by its tokens; so a cache of 16-token
    means gives the 64-token ones bit for bit.

    Args:
        x: ``[B, F * T, H, D]`` float32, float16 or bfloat16; D a multiple of 8 up to 256.
        frame_tokens: T, tokens of a latent frame.
        block: tokens of a block: 4, 8, 16, 32, 64 or 128. Mass and lse scores use
            ``block_k // 4``, mean scores ``block_k``.
        out: where to write, ``[B, F * ceil(T / block), H, D]`` float32, for example a slice of a
            larger cache; made when None.

    Returns:
        ``out``, float32, never rounded to bfloat16.

    Raises:
        ValueError: L is not whole frames, a size or stride does not fit, ``x`` requires grad.
        TypeError: a dtype is not one of the above.

    Traffic: ``itemsize * B * L * H * D`` bytes read, ``1 / block`` of the elements written.
    Source: Light Forcing (arXiv 2602.04789), token compression; float32 is ours.
    Reference: :func:`lightforcing.reference.compress`.
    """
    if compiling():
        from .torch_ops import traced_compress

        return traced_compress(x, frame_tokens, block, out)
    x = ready(x, "x")
    return like(
        _core.compress(x, writable(out), allocator(x), frame_tokens, block, stream_of(x)), x
    )


def plan_selection(
    q_frames: int,
    k_frames: int,
    frame_tokens: int,
    *,
    sparsity: float,
    block_k: int = 64,
    keep_frames: int = 6,
    hierarchy: bool = True,
) -> tuple[int, int, int]:
    """What :func:`select_blocks` will do, in integers: ``(blocks, kept, keep_frames)``.

    ``kept = max(1, floor((1 - sparsity) * blocks + 1e-9))``, all of them when no frame is past.
    ``keep_frames`` is the asked one, raised to the smallest that holds ``kept`` candidates.

    Args:
        q_frames: frames of the query (the last ones of the key sequence).
        k_frames: resident frames F.
        frame_tokens: T.
        sparsity: share of the key blocks not attended, in [0, 1].
        block_k: tokens of a key block.
        keep_frames: past frames that the frame stage keeps.
        hierarchy: whether there is a frame stage.
    """
    return _core.select_plan(
        q_frames, k_frames, frame_tokens, block_k, sparsity, keep_frames, hierarchy
    )


def select_blocks(
    q: Tensor,
    k: Tensor,
    *,
    frame_tokens: int,
    sparsity: float,
    keep_frames: int = 6,
    sink_frames: int = 1,
    near_frames: int = 2,
    score: str = "mean",
    hierarchy: bool = True,
    block_q: int = 128,
    block_k: int = 64,
    scale: float | None = None,
    k_means: Tensor | None = None,
    return_scores: bool = False,
) -> BlockList | tuple[BlockList, Tensor]:
    """Choose the key blocks that each query block attends: hierarchical sparse attention.

    Per (batch, head, query block): score every key block, keep the first ``sink_frames``, the last
    ``near_frames`` of the past and the best other past frames up to ``keep_frames``, and among
    their blocks and the current frames' take the ``kept`` best. Ties go to the lower index, -0
    ties with +0, NaN ranks last.

    Scores: ``mean`` is ``<mean of q rows, mean of k rows>`` (the paper's). ``mass`` estimates the
    attention mass a block receives: query and key blocks are cut into sub-blocks of
    ``block_k // 4`` tokens, ``p_a = softmax over all key sub-blocks b of (scale <q_a, k_b> +
    log n_b)``, and a block's score is the sum over a of ``n_a`` times the ``p_ab`` of its
    sub-blocks. ``lse`` is ``log sum n_a n_b exp(scale <q_a, k_b>)``.

    Args:
        q: ``[B, Lq, H, D]``, after QK-norm and RoPE: the last Lq tokens of the key sequence.
        k: ``[B, Lk, H, D]``, F whole frames, oldest first; dtype and device of ``q``.
        frame_tokens: T. Lq and Lk are whole frames.
        sparsity: this call's share of key blocks not attended, in [0, 1]; at least one is kept.
        keep_frames: past frames kept by the frame stage, sink and near ones included.
        sink_frames: first frames that are always candidates.
        near_frames: last past frames that are always candidates.
        score: ``"mean"``, ``"mass"`` or ``"lse"``.
        hierarchy: False skips the frame stage (1-D top-k over all blocks).
        block_q: query rows that share a list, 16 to 128.
        block_k: tokens of a key block: 16, 32, 64 or 128; blocks restart at every frame.
        scale: of mass and lse logits; None is ``D ** -0.5``. Unused by ``mean``.
        k_means: float32 means of the first P = F - f past frames, or of all F, as
            :func:`compress` gives them with ``block=block_k`` (mean) or ``block_k // 4``.
        return_scores: also return the block scores, ``[B, H, R, J]`` float32.

    Returns:
        A :class:`BlockList` whose rows are ascending and exactly ``kept`` long; its
        ``keep_frames`` says what the frame stage used.

    Raises:
        ValueError: sizes disagree, Lq or Lk is not whole frames, a number is out of range.
        TypeError: a dtype or kind is wrong.

    Source: Light Forcing (arXiv 2602.04789), HSA; differs: frame-aligned ragged blocks, float32
    means, deterministic ties, and the mass and lse scores.
    Reference: :func:`lightforcing.reference.select_blocks`.
    """
    if compiling():
        from .torch_ops import traced_select_blocks

        return traced_select_blocks(
            q, k, k_means, frame_tokens, sparsity, keep_frames, sink_frames, near_frames, score,
            hierarchy, block_q, block_k, scale, return_scores,
        )  # fmt: skip
    q, k = ready(q, "q"), ready(k, "k")
    indices, scores, used, q_len, k_len = _core.select_blocks(
        q, k, None if k_means is None else ready(k_means, "k_means"), allocator(q), frame_tokens,
        sparsity, keep_frames, sink_frames, near_frames, score, hierarchy, block_q, block_k, scale,
        return_scores, stream_of(q),
    )  # fmt: skip
    blocks = BlockList.full_rows(
        like(indices, q), q_len, k_len, frame_tokens, block_q, block_k, used
    )
    return (blocks, like(scores, q)) if return_scores else blocks


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockList | None = None,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention of every query block over the key blocks in its list.

    ``out[i] = sum_j softmax_j(scale <q_i, k_j>) v_j`` over the tokens j of the kept blocks; max,
    sum and accumulation in float32. A row with an empty list is zeros, with LSE -inf. Logits past
    float32 count as its largest numbers. On CUDA, where tensor cores add, a logit whose terms pass
    that range with both signs (entries of q and k from about 1e18 on) may be NaN, which makes its
    row of ``out`` and its LSE NaN and touches no other row.

    Args:
        q: ``[B, Lq, H, D]`` float32, float16 or bfloat16; D a multiple of 8 up to 256.
        k: ``[B, Lk, H, D]``, dtype and device of ``q``.
        v: ``[B, Lk, H, D]``, likewise.
        blocks: the lists; None is dense attention over all of k (any Lq and Lk of 1 or more).
        scale: finite and above 0; None is ``D ** -0.5``.
        return_lse: also return the log-sum-exp of the scaled logits, natural log, float32
            ``[B, H, Lq]``. ``exp(lse_kept - lse_dense)`` is a row's attention-mass recall.
        out: where to write, shape and dtype of ``q``; made (contiguous) when None.

    Returns:
        ``out`` ``[B, Lq, H, D]`` in the dtype of ``q``, or ``(out, lse)``.

    Raises:
        ValueError: sizes disagree, the list is of another geometry or not ascending in range.
        TypeError: a dtype or kind is wrong.

    Traffic: ``4 * Lq * D`` FLOPs for every kept key and head.
    Source: FlashAttention-2 (arXiv 2307.08691) for the online softmax.
    Reference: :func:`lightforcing.reference.attention`.
    """
    if compiling():
        from .torch_ops import traced_block_sparse_attention

        return traced_block_sparse_attention(q, k, v, blocks, scale, return_lse, out)
    q, k, v = ready(q, "q"), ready(k, "k"), ready(v, "v")
    rows = blocks._row() if isinstance(blocks, BlockList) else blocks
    result = _core.block_sparse_attention(
        q, k, v, rows, writable(out), allocator(q), scale, return_lse, stream_of(q)
    )
    if return_lse:
        return like(result[0], q), like(result[1], q)
    return like(result, q)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    frame_tokens: int,
    sparsity: float,
    return_lse: bool = False,
    return_blocks: bool = False,
    out: Tensor | None = None,
    scale: float | None = None,
    **selection: Any,
) -> Tensor | tuple[Tensor, ...]:
    """Select, then attend: sparse attention of one chunk over the resident frames.

    Args:
        q: ``[B, Lq, H, D]``, the last Lq tokens of the key sequence.
        k: ``[B, Lk, H, D]``, F whole frames, oldest first.
        v: ``[B, Lk, H, D]``.
        frame_tokens: T, tokens of a latent frame.
        sparsity: this call's share of key blocks not attended, in [0, 1]; at least one is kept.
        return_lse: also return the LSE, float32 ``[B, H, Lq]``.
        return_blocks: also return the :class:`BlockList`.
        out: as in :func:`block_sparse_attention`.
        scale: of the attention and of mass and lse scores; None is ``D ** -0.5``.
        **selection: further keywords of :func:`select_blocks`.

    Returns:
        ``out``, followed by the LSE and the list where asked for.

    Raises:
        ValueError: as :func:`select_blocks` and :func:`block_sparse_attention`.
        TypeError: as those.
    """
    if selection.pop("return_scores", False):
        raise TypeError("return_scores: expected in select_blocks only, got it in attention")
    blocks = select_blocks(
        q, k, frame_tokens=frame_tokens, sparsity=sparsity, scale=scale, **selection
    )
    result = block_sparse_attention(q, k, v, blocks, scale=scale, return_lse=return_lse, out=out)
    if not return_blocks:
        return result
    return (*result, blocks) if return_lse else (result, blocks)


def set_num_threads(threads: int) -> None:
    """Threads of every CPU operator; 0 goes back to OpenMP's default. Results do not change."""
    _core.set_threads(threads)
