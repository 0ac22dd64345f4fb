"""The handle of a patched model: it decides call by call, and keeps the caches and the counts."""

import logging
import threading
import weakref
from collections import OrderedDict, defaultdict

import torch
from torch.autograd import forward_ad

from . import _core, adapters, hook, ops, reasons, report
from .arrays import is_dual
from .config import Config
from .decide import Decisions, decide, place
from .means import BUFFERS, KeyMeans, address_inside
from .selectors.choose import Chooser, layout
from .stats import Record, Timer

logger = logging.getLogger("lightforcing")
logger.addHandler(logging.NullHandler())


class Handle:
    """What :func:`lightforcing.patch` returns: one per model, also a context manager.

    ``print(handle)`` is the report. Leaving the ``with`` block unpatches.
    """

    def __init__(self, config, adapter):
        """Made by :func:`lightforcing.patch`."""
        self.config = config
        self.adapter = adapter
        self.frames_per_chunk = None  # as the model last said
        self.depth = 0  # layers, as numbered
        self.facts = {}  # frame_tokens, window, class name: as the last call said
        self._start()

    def _start(self):
        self._hooks = []  # weak: a hook and its layer never outlive the model
        self._tellers = []  # weak: modules that may say num_frame_per_block
        self._lock = threading.RLock()
        self._clear()

    def _clear(self):
        self.record = Record()
        self._means = defaultdict(KeyMeans)  # by layer
        self._steps = defaultdict(OrderedDict)  # by layer: cache -> [first frame, calls before]
        self._chooser = Chooser()
        self._schedules = {}
        self._decisions, self._last = Decisions(), None
        self._size, self._before = 0, None  # of this forward; its last layer
        self._spare = {}  # workspaces, by stream
        # Do the settings ask for nothing that differs from call to call of a kind, or is measured?
        c = self.config
        self._even = not (c.timing or c.probe or c.dense_layers or c.dense_steps) and not (
            c.sparsity == 0 and c.schedule is None
        )
        self._warned = set()
        self.shortest_query = None  # frames, of the calls with a cache

    def __getstate__(self):
        """A copy keeps the settings; hooks register again, counts and caches start afresh."""
        kept = ("config", "adapter", "depth", "frames_per_chunk", "facts")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state):
        """Start afresh."""
        self.__dict__.update(state)
        self._start()

    # ---- patching ---------------------------------------------------------------------

    @property
    def hooks(self):
        """The hooks of this handle that are alive, first layer first."""
        hooks = [h for h in (ref() for ref in self._hooks) if h is not None and h.handle is self]
        return sorted(hooks, key=lambda h: h.layer)

    @property
    def active(self):
        """Is anything patched?"""
        return bool(self.hooks)

    def adopt(self, hooked):
        """A hook, new or copied, belongs to this handle from now on."""
        with self._lock:
            self._hooks = [r for r in self._hooks if r() not in (None, hooked)]
            self._hooks.append(weakref.ref(hooked))

    def take(self, layers, modules):
        """Patch ``layers``; those that another handle patched change over to this one."""
        before = [hook.hook_of(layer) for layer in layers]
        owners = [None if h is None else h.handle for h in before]
        new = any(owner is not self for owner in owners)
        if new:
            self.depth = len(layers)
        for index, layer in enumerate(layers):
            hooked = hook.attach(layer, self, index if new else before[index].layer)
            self.adopt(hooked)
            self.adapter.install(layer, self)
            hooked.intercepted = True
        for layer, owner in zip(layers, owners, strict=True):
            if owner not in (None, self) and not owner.active:
                owner.adapter.remove(layer, owner)
        tellers = [m for m in modules if hasattr(m, "num_frame_per_block")]
        self._tellers = [weakref.ref(m) for m in tellers]
        self._read_chunk()
        self.facts["layer"] = type(layers[0]).__name__

    def update(self, config):
        """New settings; counts, caches and schedules start afresh."""
        if not isinstance(config, Config):
            raise TypeError(f"config: expected a Config, got {config!r}")
        missing = [
            i for i in config.dense_layers if self.depth and not -self.depth <= i < self.depth
        ]
        if missing:
            raise ValueError(
                f"dense_layers: expected layers of the {self.depth} patched ones, got {missing}"
            )
        layers = config.budget and len(config.budget.shares)
        if layers and self.depth and layers != self.depth:
            raise ValueError(
                f"budget: expected shares for {self.depth} layers, the patched ones, got {layers}"
            )
        for hooked in self.hooks if layers else ():
            heads, given = self.adapter.heads(hooked.module), len(config.budget.shares[0])
            if heads not in (None, given):
                raise ValueError(
                    f"budget: expected shares for {heads} heads, as layer {hooked.layer} has, "
                    f"got {given}"
                )
        self.config = config
        self.reset()

    def unpatch(self):
        """Put every original object back. Harmless the second time."""
        for hooked in self.hooks:
            hook.detach(hooked)
            self.adapter.remove(hooked.module, self)
        self._means.clear()
        self._spare.clear()

    def __enter__(self):
        """The handle itself."""
        return self

    def __exit__(self, *error):
        """Unpatch."""
        self.unpatch()

    def reset(self):
        """Forget statistics, cached means, step counts, warnings and solved schedules."""
        with self._lock:
            self._clear()

    # ---- one forward of one layer, called by hook.Hook ------------------------------------

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
        visit.step = self._step(layer, call)
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
            self._means[layer].leave(visit)
        if visit.calls == 0:
            reason = visit.reason or reasons.NO_CALL
            self.record.note(layer, None, reason)
            if visit.call is not None:
                self._steps[layer].pop(visit.call.cache, None)
                if self.config.strict and not (hook.local.dense or _core.is_disabled()):
                    raise reasons.StrictError(f"{_where(layer, None)}: {reason}")
                self._warn(reason, layer)

    def _step(self, layer, call):
        """How often this layer ran at this place of this cache before."""
        steps = self._steps[layer]
        start, step = steps.pop(call.cache, (None, 0))
        if start != call.start:
            step = 0
        steps[call.cache] = (call.start, step + 1)
        if len(steps) > BUFFERS:
            steps.popitem(last=False)
        return step

    # ---- one attention call, called by hook.route -----------------------------------------

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
        ):  # most calls: _why_dense() would find nothing, and _sparse() has nothing to measure
            out, _ = self._whole(visit, decision, q, k, v, False)
            self.record.plain(visit.hook.layer, decision)
            return out
        reason = self._why_dense(visit, decision, q, k, v, extra)
        if reason is None:
            return self._sparse(visit, decision, q, k, v)
        layer, chunk = visit.hook.layer, decision and decision.chunk
        if reason not in reasons.PLANNED:
            if self.config.strict:
                raise reasons.StrictError(f"{_where(layer, chunk)}: dense because of {reason}")
            self._warn(reason, layer, chunk)
        if decision is not None:
            self._means[layer].enter(visit, k, decision, grow=False)
        timer = self._timer(visit, q) if isinstance(q, torch.Tensor) else None
        out = original(*args, **kwargs)
        if timer is not None:
            timer.stop()
        pairs = decision.pairs if decision else 0
        self.record.dense(layer, chunk, reason, pairs, timer)
        return out

    def _sparse(self, visit, decision, q, k, v):
        layer = visit.hook.layer
        timer = self._timer(visit, q)
        density, captured = decision.density, visit.capture != 0
        probed = self.config.probe > 0 and not captured
        if decision.step is None:
            out, lse, density = self._apart(visit, decision, q, k, v, probed)
            if captured and isinstance(density, torch.Tensor):  # unwritten before a replay
                density = decision.density
        else:
            out, lse = self._whole(visit, decision, q, k, v, probed)
        if timer is not None:
            timer.stop()
        recall = None if lse is None else self._recall(visit, q, k, v, lse)
        self.record.sparse(layer, decision, density, timer, recall)
        return out

    def _whole(self, visit, decision, q, k, v, want_lse):
        """A sparse call in one call of the core."""
        entry = self._means[visit.hook.layer].enter(visit, k, decision)
        run, fresh = decision.step.run, visit.capture != 0
        if entry is None:
            out, lse, _ = run(q, k, v, None, 0, want_lse, fresh)
        else:
            out, lse, _ = run(q, k, v, entry.means, entry.frames, want_lse, fresh)
            entry.frames = decision.frames
        return out, lse

    def _timer(self, visit, q):
        """The started timer of a call, or None where none is wanted or none can run."""
        return Timer(q) if self.config.timing and not visit.capture else None

    def _apart(self, visit, decision, q, k, v, probed):
        """A sparse call of several operators: another selector, layout, or kind of tensor."""
        (q, k, v), back = layout(self.config, visit, q, k, v)
        blocks, density = self._choose(visit, decision, q, k)
        out = ops.block_sparse_attention(q, k, v, blocks, return_lse=probed)
        out, lse = out if probed else (out, None)
        if back is not None:
            out, lse = back(out, 1), None if lse is None else back(lse, 2)
        return out, lse, density

    def _choose(self, visit, decision, q, k):
        """The list of such a call, and its share of the blocks."""
        config, means = self.config, self._means[visit.hook.layer]
        found = self._chooser.shared(config, visit, q, k)
        own = config.selector is not None or config.budget is not None
        if found is not None or own:
            means.enter(visit, k, decision, grow=False)
        if found is not None:
            return found
        if own:
            found = self._chooser.select(config, visit, decision, decision.kept, q, k)
        else:
            blocks = ops.select_blocks(
                q,
                k,
                frame_tokens=decision.frame_tokens,
                sparsity=decision.sparsity,
                k_means=means.pool(visit, k, decision),
                **config.selection(),
            )
            found = blocks, decision.density
        self._chooser.keep(config, visit, q, k, *found)
        return found

    def _decide(self, visit, q, k, v):
        """What calls of this kind come to; None if the place in the video is not known."""
        if visit.first_frame is None:
            return None
        known = key = None
        if type(q) is type(k) is type(v) is torch.Tensor and not (
            q.is_neg() or k.is_neg() or v.is_neg()
        ):
            known = _core.facts(q, k, v, visit.keys)
        if known is not None:
            facts, visit.address, visit.capture = known
            key = (facts, visit.first_frame, visit.frame_tokens, visit.window, self._size)
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
        spare = None if known is None else self._spare
        decide(decision, self.config, self.schedule, visit, q, k, v, spare)
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

    def _recall(self, visit, q, k, v, lse):
        """Mean and 5th percentile of the recall of evenly spaced query rows, as tensors."""
        count = min(self.config.probe, q.shape[1])
        stride = q.shape[1] // count
        first = visit.step * 7919 % stride  # other rows in every step
        rows = slice(first, first + stride * (count - 1) + 1, stride)
        _, dense = ops.block_sparse_attention(q[:, rows], k, v, return_lse=True)
        recall = (lse[:, :, rows] - dense).exp().flatten()
        return recall.mean(), recall.quantile(0.05)

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

    @property
    def means_bytes(self):
        """Bytes of cached block means."""
        return sum(m.nbytes for m in list(self._means.values()))

    def schedule(self, frames_per_chunk, window):
        """The solved (or given) schedule for these facts."""
        key = frames_per_chunk, window
        if key not in self._schedules:
            self._schedules[key] = report.schedule(self.config, frames_per_chunk, window)
        return self._schedules[key]

    # ---- what the user reads -------------------------------------------------------------

    def stats(self):
        """Counts in plain Python values, JSON-ready.

        Returns:
            A dict: the sums over all calls (``calls``, ``sparse_calls``, ``density``, ``dense``
            by reason, ``ms``, ``recall``), ``attention_share`` of a step with timing on,
            ``chunks``, a list of the same sums by chunk (chunk 1 is the first; None where the
            place was not known), and ``layers``, by layer and chunk.
        """
        return report.stats(self)

    def explain(self, **facts):
        """The plan chunk by chunk and the gain it predicts, as a :class:`report.Plan`.

        Facts that no call has told yet are assumed, and the text says so; ``num_frames``,
        ``frames_per_chunk``, ``frame_tokens`` and ``attention_share`` may be given here.
        """
        return report.explain(self, **facts)

    def report(self):
        """What ran sparse, how sparse, and what stayed dense and why, as text."""
        return report.text(self)

    def to_dict(self):
        """Settings, plan and statistics, JSON-ready."""
        return {
            "config": self.config.to_dict(),
            "layers": len(self.hooks),
            "plan": self.explain().to_dict(),
            "stats": self.stats(),
        }

    def __str__(self):
        """The report."""
        return self.report()

    def __repr__(self):
        """One line."""
        return f"<lightforcing.Handle of {len(self.hooks)} layers, sparsity {self.config.sparsity}>"

    def _repr_html_(self):
        return report.html(self)

    def _warn(self, reason, layer, chunk=None):
        if reason not in self._warned and not torch.compiler.is_compiling():
            self._warned.add(reason)
            logger.warning("%s: dense because of %s (said once)", _where(layer, chunk), reason)


def _where(layer, chunk):
    return f"layer {layer}" + (f", chunk {chunk}" if chunk else "")
