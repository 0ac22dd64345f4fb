"""The definition of every operator: slow, obvious NumPy in float64.

Nothing here is fast and nothing here is shared with the C core, so agreement means
something. Tensors are ``[B, L, H, D]`` (token-major); torch tensors of any dtype are
converted first. Source of the method: Light Forcing (arXiv 2602.04789); where a rule is
ours the docstring says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

FLOAT32_MAX = float(np.finfo(np.float32).max)
# exp() of less is 0 in every backend; a mass below the floor (128 such rows) is noise.
FLOAT32_LOG = -87.0
FLOAT32_FLOOR = 1e-35


def as_float64(x) -> np.ndarray:
    """Convert an array or torch tensor of any dtype, bfloat16 included, to float64."""
    if hasattr(x, "detach"):
        x = x.detach().cpu().double().numpy()
    return np.asarray(x, dtype=np.float64)


# ---- CAG: the sparsity of every chunk ------------------------------------------------


def law_value(law, parameter, end, resident, base) -> float:
    """One unclipped s for a solved parameter (``beta``, or the kept frames of ``count``).

    linear: ``base - beta / sqrt(n)``; exponential: ``base - 1 + exp(-beta / sqrt(n))``;
    count: ``1 - kept / l`` (ours); constant: the parameter itself.
    """
    if law == "linear":
        return base - parameter / math.sqrt(end)
    if law == "exponential":
        return base - 1 + math.exp(-parameter / math.sqrt(end))
    if law == "count":
        return 1 - parameter / resident
    return parameter


def cag_schedule(
    num_frames=21,
    frames_per_chunk=3,
    *,
    sparsity=0.80,
    base=None,
    window=None,
    law="linear",
    chunk_ends=None,
    dense_frames=None,
) -> np.ndarray:
    """Sparsity of each chunk, ``[chunks]`` float64, by bisection for every law.

    With ``l = min(n, window)``, over the chunks that are not dense:
    ``sum(l * clip(s, 0, 1)) / sum(l) = sparsity``. A chunk with fewer than
    ``dense_frames`` frames before it is dense (s = 0) and outside the budget.

    Source: Light Forcing, Chunk-Aware Growth; the clipped re-solve and ``count`` are ours.
    """
    ends = [min(n + frames_per_chunk, num_frames) for n in range(0, num_frames, frames_per_chunk)]
    ends = ends if chunk_ends is None else list(chunk_ends)
    base = min(1.0, sparsity + 0.10) if base is None else base
    dense_frames = frames_per_chunk if dense_frames is None else dense_frames
    before = [0, *ends[:-1]]
    budget = [c for c, past in enumerate(before) if past > 0 and past >= dense_frames]
    s = np.zeros(len(ends))
    if sparsity == 0 or not budget:
        return s
    resident = [min(n, window) if window else n for n in ends]

    def solution(parameter):
        return [
            min(1.0, max(0.0, law_value(law, parameter, ends[c], resident[c], base)))
            for c in budget
        ]

    def mean(parameter):
        return np.average(solution(parameter), weights=[resident[c] for c in budget])

    if law == "constant":
        s[budget] = sparsity
        return s
    # In every law a larger parameter means less sparsity, from >= the target at 0 to 0.
    low, high = 0.0, 1.0
    while mean(high) > sparsity:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) > sparsity else (low, middle)
    s[budget] = solution((low + high) / 2)
    return s


# ---- blocks --------------------------------------------------------------------------


def block_starts(frames: int, frame_tokens: int, block: int) -> np.ndarray:
    """First token of every block; blocks never straddle a frame, its last one is short."""
    return np.array(
        [f * frame_tokens + t for f in range(frames) for t in range(0, frame_tokens, block)],
        dtype=np.int64,
    )


def _row_starts(rows: int, block: int, sub: int) -> np.ndarray:
    """First row of every sub-block of every query block."""
    return np.array([t for r in range(0, rows, block) for t in range(r, min(r + block, rows), sub)])


def _counts(starts, length) -> np.ndarray:
    return np.diff(np.append(starts, length))


def _means(x, starts) -> np.ndarray:
    """Means of the runs of tokens that begin at ``starts``: [B, L, H, D] -> [B, n, H, D]."""
    with np.errstate(all="ignore"):
        sums = np.add.reduceat(x, starts, axis=1)
    return sums / _counts(starts, x.shape[1])[None, :, None, None]


def compress(x, frame_tokens: int, *, block: int = 64) -> np.ndarray:
    """Block means, ``[B, F*T, H, D] -> [B, F*ceil(T/block), H, D]``.

    ``mean_j = sum of the tokens of block j / their number``.
    """
    x = as_float64(x)
    return _means(x, block_starts(x.shape[1] // frame_tokens, frame_tokens, block))


# ---- selection -----------------------------------------------------------------------


def _clamped_logits(qa, kb, scale) -> np.ndarray:
    with np.errstate(all="ignore"):
        logits = scale * np.einsum("bahd,bchd->bhac", qa, kb)
    return np.clip(logits, -FLOAT32_MAX, FLOAT32_MAX)  # NaN passes through


def _reduce_pairs(x, rows, columns, op) -> np.ndarray:
    """Reduce a [.., a, b] grid of sub-block pairs to [.., query block, key block]."""
    return op.reduceat(op.reduceat(x, rows, axis=-2), columns, axis=-1)


def block_scores(
    q, k, *, frame_tokens, score="mean", block_q=128, block_k=64, scale=None
) -> tuple[np.ndarray, np.ndarray]:
    """Score of every key block for every query block, and how far float32 may be off.

    mean: ``<q~_r, k~_j>`` of the block means (the paper's).
    mass (ours): with sub-blocks of ``block_k / 4`` tokens, their sizes n and means,
    ``p_a = softmax_b(scale <q_a, k_b> + log n_b)`` over all resident b, and
    ``score = sum_a n_a sum_{b in j} p_ab``.
    lse (ours): ``log sum_{a in r, b in j} n_a n_b exp(scale <q_a, k_b>)``.
    A NaN logit takes no part in a softmax; its key block scores NaN. A p below exp(-87) of
    its row's largest is 0.

    Returns:
        scores and tolerances, both ``[B, H, R, J]``. Two scores closer than the tolerance
        may rank either way: mean ``1e-5 |q~||k~|``, lse ``1e-5 (1 + scale max|q_a||k_b|)``,
        mass the same times the score.
    """
    q, k = as_float64(q), as_float64(k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    frames = k.shape[1] // frame_tokens
    key_starts = block_starts(frames, frame_tokens, block_k)
    if score == "mean":
        qm = _means(q, _row_starts(q.shape[1], block_q, block_q))
        km = _means(k, key_starts)
        with np.errstate(all="ignore"):
            scores = np.einsum("brhd,bjhd->bhrj", qm, km)
            lengths = np.einsum(
                "brh,bjh->bhrj", np.linalg.norm(qm, axis=-1), np.linalg.norm(km, axis=-1)
            )
        return scores, 1e-5 * lengths

    sub = block_k // 4
    row_starts = _row_starts(q.shape[1], block_q, sub)
    sub_starts = block_starts(frames, frame_tokens, sub)
    n_a, n_b = _counts(row_starts, q.shape[1]), _counts(sub_starts, k.shape[1])
    qa, kb = _means(q, row_starts), _means(k, sub_starts)
    rows = np.flatnonzero(row_starts % block_q == 0)
    columns = np.searchsorted(sub_starts, key_starts)

    logits = _clamped_logits(qa, kb, scale)
    bad = _reduce_pairs(np.isnan(logits), rows, columns, np.logical_or)
    logits = np.where(np.isnan(logits), -np.inf, logits) + np.log(n_b)
    with np.errstate(all="ignore"):
        longest = np.linalg.norm(qa, axis=-1).max(initial=0), np.linalg.norm(kb, axis=-1)
        tolerance = 1e-5 * (1 + scale * longest[0] * np.nan_to_num(longest[1]).max(initial=0))
        if score == "lse":
            logits += np.log(n_a)[:, None]
            scores = _reduce_pairs(logits, rows, columns, np.logaddexp)
            tolerance = np.full_like(scores, tolerance)
        else:
            top = logits.max(axis=-1, keepdims=True)
            logits -= np.where(np.isfinite(top), top, 0)
            p = np.where(logits < FLOAT32_LOG, 0, np.exp(logits))
            p /= p.sum(axis=-1, keepdims=True)
            scores = _reduce_pairs(p * n_a[:, None], rows, columns, np.add)
            tolerance = np.maximum(tolerance * scores, FLOAT32_FLOOR)
    return np.where(bad, np.nan, scores), tolerance


def frame_scores(scores, frame_tokens: int, *, block_k=64, score="mean") -> np.ndarray:
    """Score of every frame from its blocks' scores, ``[.., J] -> [.., F]``.

    mean: token-weighted mean; mass: sum; lse: log-sum-exp. A NaN block makes it NaN.
    """
    starts = block_starts(1, frame_tokens, block_k)
    by_frame = scores.reshape(*scores.shape[:-1], -1, len(starts))
    with np.errstate(all="ignore"):
        if score == "mean":
            return (by_frame * _counts(starts, frame_tokens)).sum(-1) / frame_tokens
        if score == "mass":
            return by_frame.sum(-1)
        return np.logaddexp.reduce(by_frame, axis=-1)


def ranking(scores) -> np.ndarray:
    """Indices from best to worst: ties to the lower index, -0 equals +0, NaN last."""
    nan = np.isnan(scores)
    return np.lexsort((np.arange(len(scores)), -np.where(nan, 0, scores), nan))


@dataclass(frozen=True)
class Plan:
    """The integers of a selection: ``kept`` of ``blocks``, and ``keep_frames`` as raised."""

    blocks: int
    kept: int
    keep_frames: int


def plan_selection(
    q_frames, k_frames, frame_tokens, *, sparsity, block_k=64, keep_frames=6, hierarchy=True
) -> Plan:
    """``kept = max(1, floor((1 - s) N_k + 1e-9))``; keep_frames rises until kept fits."""
    per_frame = -(-frame_tokens // block_k)
    blocks = k_frames * per_frame
    kept = min(blocks, max(1, math.floor((1 - sparsity) * blocks + 1e-9)))
    if hierarchy:
        while min(keep_frames + q_frames, k_frames) * per_frame < kept:
            keep_frames += 1
    return Plan(blocks, kept, keep_frames)


def candidate_frames(scores, past, *, keep_frames, sink_frames, near_frames) -> list[int]:
    """Frames whose blocks may be kept, for one row of frame scores ``[F]``.

    ``{first sink} + {last near of the past} + {best of the other past} + {current}``.
    """
    frames = list(range(len(scores)))
    if past <= keep_frames:
        return frames
    forced = [f for f in range(past) if f < sink_frames or f >= past - near_frames]
    others = [f for f in range(past) if f not in forced]
    best = ranking(scores[others])[: keep_frames - len(forced)]
    return sorted([*forced, *(others[i] for i in best), *range(past, len(scores))])


@dataclass(frozen=True)
class Selection:
    """What :func:`select_blocks` chose, and what is needed to judge a near miss."""

    indices: np.ndarray  # [B, H, R, K] ascending
    scores: np.ndarray  # [B, H, R, J]
    tolerance: np.ndarray  # [B, H, R, J]
    frame_scores: np.ndarray  # [B, H, R, F]
    plan: Plan
    past: int  # frames before the query
    blocks_per_frame: int
    forced: tuple[int, int] | None  # (sink_frames, near_frames); None: no frame stage
    score: str


def select_blocks(
    q,
    k,
    *,
    frame_tokens,
    sparsity,
    keep_frames=6,
    sink_frames=1,
    near_frames=2,
    score="mean",
    hierarchy=True,
    block_q=128,
    block_k=64,
    scale=None,
) -> Selection:
    """Key blocks that each query block keeps: first frames, then blocks inside them.

    Of the candidate frames' blocks the ``kept`` best, listed ascending. All ties go to
    the lower index. P = 0 (no past) and ``kept >= J`` keep everything.

    Source: Light Forcing, Hierarchical Sparse Attention; ``mass`` and ``lse`` are ours.
    """
    q_frames, k_frames = q.shape[1] // frame_tokens, k.shape[1] // frame_tokens
    past = k_frames - q_frames
    per_frame = -(-frame_tokens // block_k)
    plan = plan_selection(
        q_frames,
        k_frames,
        frame_tokens,
        sparsity=0 if past == 0 else sparsity,
        block_k=block_k,
        keep_frames=keep_frames,
        hierarchy=hierarchy,
    )
    scores, tolerance = block_scores(
        q,
        k,
        frame_tokens=frame_tokens,
        score=score,
        block_q=block_q,
        block_k=block_k,
        scale=scale,
    )
    by_frame = frame_scores(scores, frame_tokens, block_k=block_k, score=score)
    indices = np.zeros((*scores.shape[:3], plan.kept), dtype=np.int64)
    for row in np.ndindex(scores.shape[:3]):
        candidates = range(k_frames)
        if hierarchy:
            candidates = candidate_frames(
                by_frame[row],
                past,
                keep_frames=plan.keep_frames,
                sink_frames=sink_frames,
                near_frames=near_frames,
            )
        blocks = np.array([f * per_frame + j for f in candidates for j in range(per_frame)])
        indices[row] = np.sort(blocks[ranking(scores[row][blocks])[: plan.kept]])
    return Selection(
        indices=indices,
        scores=scores,
        tolerance=tolerance,
        frame_scores=by_frame,
        plan=plan,
        past=past,
        blocks_per_frame=per_frame,
        forced=(sink_frames, near_frames) if hierarchy else None,
        score=score,
    )


# ---- attention -----------------------------------------------------------------------


def token_mask(blocks, q_len, k_len, *, frame_tokens, block_q=128, block_k=64) -> np.ndarray:
    """Expand a boolean block map ``[B, H, R, J]`` to tokens, ``[B, H, Lq, Lk]``."""
    starts = block_starts(-(-k_len // frame_tokens), frame_tokens, block_k)
    by_row = np.repeat(np.asarray(blocks, bool), block_q, axis=2)[:, :, :q_len]
    return np.repeat(by_row, _counts(starts, k_len), axis=3)


def attention(q, k, v, mask=None, *, scale=None) -> tuple[np.ndarray, np.ndarray]:
    """Exact softmax attention over the keys that a boolean token mask keeps.

    ``lse = log sum_t exp(scale <q, k_t>)``, ``out = sum_t exp(scale <q, k_t> - lse) v_t``.
    A row without keys is zeros with LSE -inf.

    Args:
        q: ``[B, Lq, H, D]``.
        k: ``[B, Lk, H, D]``.
        v: ``[B, Lk, H, D]``.
        mask: ``[B, H, Lq, Lk]`` bool (:func:`token_mask`); None keeps everything.
        scale: factor on the logits, ``D**-0.5`` if None.

    Returns:
        ``out [B, Lq, H, D]`` and ``lse [B, H, Lq]``, float64.
    """
    q, k, v = (as_float64(x).transpose(0, 2, 1, 3) for x in (q, k, v))  # [B, H, L, D]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with np.errstate(all="ignore"):
        logits = scale * (q @ k.swapaxes(2, 3))
        if mask is not None:
            logits = np.where(mask, logits, -np.inf)
        top = logits.max(axis=-1, keepdims=True)
        top = np.where(np.isneginf(top), 0, top)
        p = np.exp(logits - top)
        total = p.sum(axis=-1, keepdims=True)
        lse = (np.log(total) + top)[..., 0]
        p = np.where(total == 0, 0, p / total)
        out = p @ v
    if mask is not None and not np.isfinite(v).all():
        # A key outside the list adds nothing, even if its value is NaN: row by row.
        for b, h, i in np.ndindex(p.shape[:3]):
            keys = mask[b, h, i]
            out[b, h, i] = p[b, h, i, keys] @ v[b, h, keys]
    return out.transpose(0, 2, 1, 3), lse
