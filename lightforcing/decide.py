"""What a call of a patched model comes to, decided once for all calls of its kind.

A video makes thousands of attention calls, but only of a few kinds: every layer and denoising step
of a chunk has the same shapes at the same place. :class:`Decisions` remembers the answer by
``_core.facts`` (shapes, strides, dtype, device and stream as bytes), place and chunk size; reasons
that change from call to call (a context, a step, a layer) are :mod:`lightforcing.calls`'.
"""

import threading

import torch

from . import ops, reasons
from .selectors.budget import Budget
from .selectors.choose import grid_of, needs_grid
from .step import Step

MOST = 256  # kinds remembered; a chunk makes one or two, with step_share one a forward


class Decision:
    """The answer for one kind of call."""

    __slots__ = ("frame_tokens", "query", "past", "frames", "size", "chunk", "end", "window",
                 "pairs", "reason", "sparsity", "asked", "kept", "density", "raised", "step",
                 "keys", "rows")  # fmt: skip

    def __init__(self, frame_tokens, query, past, size, first_frame, window, pairs):
        """A call in whole frames."""
        self.frame_tokens = frame_tokens
        self.query, self.past, self.frames = query, past, query + past  # frames
        self.size = size  # frames of a chunk
        self.chunk = -(-first_frame // size) + 1  # 1 is the first
        self.end = first_frame + size  # n of the schedule
        self.window = window
        self.pairs = pairs  # of queries and keys, over the heads
        self.reason = None  # to stay dense
        self.sparsity, self.density = 0.0, 1.0  # of the schedule, of the call
        self.asked = 0.0  # sparsity of the call; the schedule's but for step_share
        self.kept = 0  # key blocks of a row
        self.raised = 0  # keep_frames, where the budget forced it up
        self.step = None  # the call itself, where the core takes it in one
        self.keys = None  # of the means kept for such keys, beside their address
        self.rows = 0  # means of all frames


def place(visit, q, k, size):
    """The call in whole frames, or None if that is not known."""
    if not (_is_blhd(q) and _is_blhd(k)):
        return None
    tokens, lq, lk = visit.frame_tokens, q.shape[1], k.shape[1]
    if lq % tokens or lk % tokens or not 0 < lq <= lk:
        return None
    query, pairs = lq // tokens, q.shape[0] * q.shape[2] * lq * lk
    return Decision(tokens, query, lk // tokens - query, size(query), visit.first_frame,
                    visit.window, pairs)  # fmt: skip


def _is_blhd(x):
    return isinstance(x, torch.Tensor) and x.dim() == 4


def decide(decision, config, schedule, visit, turn, q, k, v, spare):
    """Complete a decision that :func:`place` began.

    Args:
        decision: changed in place.
        config: the settings.
        schedule: ``(frames_per_chunk, window)`` to the solved schedule.
        visit: the running forward.
        turn: of the forward in its chunk, where ``step_share`` applies; -1 where it does not.
        q: the queries.
        k: the keys.
        v: the values.
        spare: workspaces for :class:`Step`; None: the core does not take the call in one step.
    """
    d = decision
    stream = torch.cuda.current_stream(k.device).cuda_stream if k.is_cuda else 0
    part = config.block_k if config.score == "mean" else config.block_k // 4
    d.keys = (k.stride(), k.shape[0], k.shape[2:], k.dtype, k.device, stream, d.frame_tokens, part)
    d.rows = d.frames * -(-d.frame_tokens // part)
    d.reason = reasons.unsupported(q, k, v) or _plan(d, config, schedule, visit, turn)
    if d.reason is None and spare is not None and config.plain:
        d.step = Step(q, k, v, frame_tokens=d.frame_tokens, sparsity=d.asked,
                      **config.selection(), spare=spare)  # fmt: skip


def _plan(d, config, schedule, visit, turn):
    """The sparsity of the call, or why it has none."""
    if d.past == 0 and d.query > d.size:
        return reasons.RECACHE
    dense_frames = config.dense_frames
    if dense_frames is None:
        dense_frames = 0 if config.schedule else d.size
    if visit.first_frame < dense_frames or d.past == 0:
        if visit.first_frame < d.size:
            return reasons.FIRST_CHUNK
        return reasons.DENSE_FRAMES if d.past else reasons.NO_PAST
    d.sparsity = float(schedule(d.size, d.window).at(d.end))
    if d.sparsity == 0:
        return reasons.ZERO
    d.asked = d.sparsity
    blocks, kept, keep_frames = _counts(d, config)
    shares = _shares(config)
    # A query of several chunks is a cache made anew, whatever the number of its forward.
    if kept < blocks and turn in shares and d.query <= d.size:
        place = list(shares).index(turn)
        kept = int(Budget((tuple(shares.values()),)).counts(kept, blocks)[0, place])
        d.asked = max(0.0, 1 - (kept + 0.5) / blocks)  # the middle of what keeps so many
        blocks, kept, keep_frames = _counts(d, config)
    if kept >= blocks:
        return reasons.ALL_KEPT
    if needs_grid(config) and grid_of(config, visit) is None:
        return reasons.NO_TILES
    d.kept, d.density = kept, kept / blocks
    if (
        config.selector is None
        and config.hierarchy
        and config.keep_frames < min(keep_frames, d.past)
    ):
        d.raised = keep_frames
    return None


def _counts(d, config):
    """Key blocks, those kept and frames kept at the sparsity that is asked for."""
    return ops.plan_selection(
        d.query,
        d.frames,
        d.frame_tokens,
        sparsity=d.asked,
        block_k=config.block_k,
        keep_frames=config.keep_frames,
        hierarchy=config.hierarchy and config.selector is None,
    )


class Decisions:
    """The last :data:`MOST` decisions by kind."""

    def __init__(self):
        """None yet."""
        self._lock = threading.Lock()
        self._known = {}
        self.get = self._known.get

    def put(self, key, decision):
        """Remember one; the oldest is forgotten when there are too many."""
        with self._lock:
            while len(self._known) >= MOST:
                del self._known[next(iter(self._known))]
            self._known[key] = decision


def _shares(config):
    """step_share of the forwards that dense_steps leaves sparse, by their number; none if even."""
    shares = dict(enumerate(config.step_share or ()))
    shares = {i: x for i, x in shares.items() if i not in config.dense_steps}
    return shares if any(shares.values()) else {}
