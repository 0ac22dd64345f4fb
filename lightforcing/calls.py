"""What a patched layer calls: place each attention call in the video, decide, and count it."""

import logging
from collections import Counter, OrderedDict, defaultdict

import torch
from torch.autograd import forward_ad

from . import _core, adapters, hook, reasons, report
from .arrays import is_dual
from .decide import Decisions, decide, place
from .means import BUFFERS, address_inside
from .sparse import Sparse, timer_of
from .stats import Record

logger = logging.getLogger("lightforcing")
logger.addHandler(logging.NullHandler())


class Calls:
    """The forwards of patched layers and the attention calls in them, and what they left behind.

    :class:`lightforcing.hook.Hook` calls :meth:`enter` and :meth:`leave` around a layer's forward,
    and :meth:`attend` in place of its dense attention call.
    """

    def __init__(self, config, adapter):
        """Of a model that follows ``adapter``."""
        self.config = config
        self.adapter = adapter
        self.frames_per_chunk = None  # as the model last said
        self.depth = 0  # layers, as numbered
        self.facts = {}  # frame_tokens, window, class name: as the last call said
        self._tellers = []  # weak: modules that may say num_frame_per_block
        self._clear()

    def _clear(self):
        c = self.config
        self.record = Record()
        self._sparse = Sparse(c)
        self._steps = defaultdict(OrderedDict)  # by layer: cache -> first token, calls, fits
        self._schedules = {}
        self._decisions, self._last = Decisions(), None
        self._size, self._before = 0, None  # of this forward; its last layer
        self.misfits = Counter()  # chunks of other numbers of forwards than step_share's
        self.captured_even = False  # was a graph captured, where step_share does not apply?
        # Do the settings ask for nothing that differs from call to call of a kind, or is measured?
        self._even = not (c.timing or c.probe or c.dense_layers or c.dense_steps) and not (
            c.sparsity == 0 and c.schedule is None
        )
        self._warned = set()
        self.shortest_query = None  # frames, of the calls with a cache

    # ---- one forward of one layer ---------------------------------------------------------

    def enter(self, hooked, args, kwargs):
        """A layer's forward begins: what is known before its attention call."""
        if not hooked.intercepted:  # a copy, or unpickled in a new process
            self.adapter.install(hooked.module, self)
            hooked.intercepted = True
        visit = hook.Visit(hooked)
        call = self.adapter.context(hooked.module, adapters.bind(hooked.module, args, kwargs))
        if isinstance(call, str):
            visit.reason = call
            return visit
        visit.call = call
        grid = self.config.grid
        if grid is not None and call.grid not in (None, grid):
            rows, columns = call.grid
            raise ValueError(
                f"grid: expected rows x columns = {rows * columns} tokens as the model tells, "
                f"{rows} x {columns}, got {grid}"
            )
        told, given = call.frame_tokens, self.config.frame_tokens
        if told is None:
            if given is None and self.config.grid:
                given = self.config.grid[0] * self.config.grid[1]
            if given is None:
                visit.reason = reasons.NO_GRID
                return visit
            told = given
        elif given is not None and given != told:
            visit.reason = f"{reasons.GRIDS_DIFFER} (set {given}, told {told})"
            return visit
        layer = hooked.layer
        if self._before is None or layer <= self._before:  # another forward of the model
            self._size = self.chunk_frames
        self._before = layer
        visit.frame_tokens = told
        visit.first_frame = call.start // told
        visit.window = self.config.window or call.window
        visit.step, visit.shared = self._step(layer, call, told)
        keys = call.keys
        if keys is not None and not keys.is_inference():
            visit.keys, visit.version = keys, keys._version
        if self.config.timing and layer == 0:
            self.record.tick(visit.first_frame, visit.step > 0)
        return visit

    def leave(self, visit):
        """A layer's forward ended without an error."""
        layer = visit.hook.layer
        if visit.entry is not None:
            self._sparse.means[layer].leave(visit)
        if visit.calls == 0:
            reason = visit.reason or reasons.NO_CALL
            self.record.note(layer, None, reason)
            if visit.call is not None:
                self._steps[layer].pop(visit.call.cache, None)
                if self.config.strict and not (hook.local.dense or _core.is_disabled()):
                    raise reasons.StrictError(f"{_where(layer, None)}: {reason}")
                self._warn(reason, layer)

    def _step(self, layer, call, frame_tokens):
        """How often this layer ran at this place of this cache before; does step_share apply?"""
        steps = self._steps[layer]
        start, step, fits = steps.pop(call.cache, (None, 0, self.config.step_share is not None))
        if start != call.start:
            if start is not None and self.config.step_share is not None:
                fits = self._fits(layer, start, step, call.start, frame_tokens, fits)
            step = 0
        steps[call.cache] = (call.start, step + 1, fits)
        if len(steps) > BUFFERS:
            steps.popitem(last=False)
        return step, fits

    def _fits(self, layer, start, forwards, now, frame_tokens, before):
        """A chunk ended after so many forwards: does the next one have those of step_share?"""
        if now < start:  # a new video knows nothing of the last one
            return True
        several = self._size and now - start > self._size * frame_tokens  # a cache made anew
        if several or (start == 0 and forwards == 1):  # or a given chunk, which is only cached
            return before
        fits = forwards == len(self.config.step_share)
        if not fits and layer == 0:
            self.misfits[forwards] += 1
        return fits

    # ---- one attention call ---------------------------------------------------------------

    def attend(self, visit, original, args, kwargs):
        """The dense call ``original(*args, **kwargs)``, sparse where the settings allow it."""
        visit.calls += 1
        if len(args) == 3 and not kwargs:
            (q, k, v), extra = args, None
        else:
            q, k, v, extra = reasons.split(original, args, kwargs)
        decision = self._decide(visit, q, k, v)
        if (
            self._even
            and decision is not None
            and decision.step is not None
            and extra is None
            and not (_core.is_disabled() or hook.local.dense)
            and not (
                torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
            )
            and forward_ad._current_level < 0
        ):  # most calls: _why_dense() would find nothing, and there is nothing to measure
            out, _ = self._sparse.whole(visit, decision, q, k, v, False)
            self.record.plain(visit.hook.layer, decision)
            return out
        reason = self._why_dense(visit, decision, q, k, v, extra)
        if reason is None:
            out, density, timer, recall = self._sparse.run(visit, decision, q, k, v)
            self.record.sparse(visit.hook.layer, decision, density, timer, recall)
            return out
        layer, chunk = visit.hook.layer, decision and decision.chunk
        if reason not in reasons.PLANNED:
            if self.config.strict:
                raise reasons.StrictError(f"{_where(layer, chunk)}: dense because of {reason}")
            self._warn(reason, layer, chunk)
        if decision is not None:
            self._sparse.means[layer].enter(visit, k, decision, grow=False)
        timer = timer_of(self.config, visit, q) if isinstance(q, torch.Tensor) else None
        out = original(*args, **kwargs)
        if timer is not None:
            timer.stop()
        pairs = decision.pairs if decision else 0
        self.record.dense(layer, chunk, reason, pairs, timer)
        return out

    def _decide(self, visit, q, k, v):
        """What calls of this kind come to; None if the place in the video is not known."""
        if visit.first_frame is None:
            return None
        turn = visit.step if visit.shared else -1
        known = key = None
        if type(q) is type(k) is type(v) is torch.Tensor and not (
            q.is_neg() or k.is_neg() or v.is_neg()
        ):
            known = _core.facts(q, k, v, visit.keys)
        if known is not None:
            facts, visit.address, visit.capture = known
            if visit.capture:
                turn = -1  # whoever replays the graph does so in any forward of a chunk
                self.captured_even = self.config.step_share is not None
            key = (facts, visit.first_frame, visit.frame_tokens, visit.window, turn, self._size)
            decision = self._decisions.get(key)
            if decision is not None:
                if decision is not self._last:
                    self._tell(decision)
                return decision
        decision = place(visit, q, k, self._chunk_of_query)
        if decision is None:
            return None
        self._tell(decision)
        if known is None:
            visit.address = address_inside(k, visit.keys)
        spare = None if known is None else self._sparse.spare
        decide(decision, self.config, self.schedule, visit, turn, q, k, v, spare)
        if key is not None and self.config.plain:
            self._decisions.put((*key[:-1], self._size), decision)
        return decision

    def _tell(self, decision):
        self._last = decision
        self.facts.update(frame_tokens=decision.frame_tokens, window=decision.window)

    def _chunk_of_query(self, frames):
        """Frames of a chunk, now that a query of so many has come."""
        if self.shortest_query is None or frames < self.shortest_query:
            self.shortest_query = frames
            self._size = self.chunk_frames
        return self._size

    def _why_dense(self, visit, decision, q, k, v, extra):
        """The reason to call the original: what changes from call to call first."""
        config = self.config
        if _core.is_disabled():
            return reasons.DISABLED
        if hook.local.dense:
            return reasons.DENSE_CONTEXT
        if visit.reason is not None:
            return visit.reason
        if torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in (q, k, v)):
            return reasons.TRAINING
        if any(isinstance(x, torch.Tensor) and is_dual(x) for x in (q, k, v)):
            return reasons.TRAINING
        if config.sparsity == 0 and config.schedule is None:
            return reasons.ZERO
        if config.dense_layers:
            layer = visit.hook.layer
            if layer in config.dense_layers or layer - self.depth in config.dense_layers:
                return reasons.DENSE_LAYER
        if config.dense_steps and visit.step in config.dense_steps:
            return reasons.DENSE_STEP
        if extra is not None:
            return extra
        if decision is None:
            unsupported = reasons.unsupported(q, k, v)
            return unsupported or reasons.not_frames(q.shape[1], k.shape[1], visit.frame_tokens)
        return decision.reason

    # ---- what the settings come to ------------------------------------------------------

    @property
    def chunk_frames(self):
        """Frames of a chunk: from the settings, the model, the shortest query so far, or 3."""
        if self.config.frames_per_chunk:
            return self.config.frames_per_chunk
        self._read_chunk()
        return self.frames_per_chunk or self.shortest_query or 3

    def _read_chunk(self):
        for teller in (ref() for ref in self._tellers):
            value = getattr(teller, "num_frame_per_block", None)
            if isinstance(value, int) and value > 1:
                self.frames_per_chunk = value
                return

    def schedule(self, frames_per_chunk, window):
        """The solved (or given) schedule for these facts."""
        key = frames_per_chunk, window
        if key not in self._schedules:
            self._schedules[key] = report.schedule(self.config, frames_per_chunk, window)
        return self._schedules[key]

    def _warn(self, reason, layer, chunk=None):
        if reason not in self._warned and not torch.compiler.is_compiling():
            self._warned.add(reason)
            logger.warning("%s: dense because of %s (said once)", _where(layer, chunk), reason)


def _where(layer, chunk):
    return f"layer {layer}" + (f", chunk {chunk}" if chunk else "")
