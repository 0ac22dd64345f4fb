"""Block means of past keys, kept from call to call where the keys never move.

Pooling the past again costs one read of all keys a call. Where a layer's keys are stored as
attention sees them, only the current chunk changes between two calls, so the means of the past
are kept: float32, one buffer for each key tensor. A kept mean is used only while all of this
holds, else the past is pooled again:

* the call's keys lie inside the same tensor object as before, at the same address and strides;
* its version counter (each in-place write of torch raises it, through any view) has not moved
  since the end of the last forward with it, and rose by at most one, the chunk's own write,
  from the start of this forward to its attention call. Moving the window takes two writes;
* the video went on: the first frame did not go back, and the frame at the start of the keys is
  the same frame of the video as before.

Tensors of inference mode have no version counter and are pooled in every call. A CUDA graph reads
only means that it pools itself, so that it may be replayed at any time; and since replays write
keys without counting, keys that a graph was captured with are pooled in every later eager call, of
any handle and after any reset: a graph outlives both.
"""

import threading
import weakref
from collections import OrderedDict

import torch

from . import ops

BUFFERS = 4  # key tensors remembered a layer: two caches of guidance, and two rollouts

_captured = {}  # by id, weakly: key tensors that some graph was captured with
_lock = threading.Lock()


def _capture(keys):
    with _lock:
        for i in [i for i, ref in _captured.items() if ref() is None]:
            del _captured[i]
        _captured[id(keys)] = weakref.ref(keys)


def _is_captured(keys):
    ref = _captured.get(id(keys))
    return ref is not None and ref() is keys


class _Entry:
    __slots__ = ("keys", "means", "rows", "frames", "first_frame", "origin", "version")

    def __init__(self, keys, means):
        self.keys = weakref.ref(keys)
        self.means = means  # float32 [B, frames * blocks, H, D]
        self.rows = means.shape[1]
        self.frames = 0  # of which so many hold
        self.first_frame = -1
        self.origin = None  # frame of the video at the start of the keys
        self.version = None  # None while a forward is in it, and for good if it raises


class KeyMeans:
    """The means of one layer's past keys, in at most :data:`BUFFERS` key tensors."""

    def __init__(self):
        """Empty."""
        self.entries = OrderedDict()
        self.capture = 0  # the graph that the last call was captured for

    @property
    def nbytes(self):
        """Bytes held."""
        return sum(e.means.nbytes for e in list(self.entries.values()))

    def enter(self, visit, k, decision, grow=True):
        """The entry of a call's keys, or None where their means cannot be kept.

        ``frames`` of them hold; whoever pools the others says so there. The entry is closed
        until :meth:`leave`.

        Args:
            visit: the running forward, whose ``address`` is that of k inside ``keys``, or 0.
            k: ``[B, F*T, H, D]``, the keys of the call.
            decision: the call in frames; its ``keys`` end in T and the tokens of a mean, its
                ``rows`` are the means of k.
            grow: make an entry where there is none.
        """
        keys = visit.keys
        if keys is None or not visit.address:
            return None
        if visit.capture != self.capture or visit.capture:
            self._change(visit)
        if _captured and not visit.capture and _is_captured(keys):
            return None
        seen = keys._version
        key = visit.address, decision.keys
        entry = self.entries.pop(key, None)
        past, first_frame = decision.past, visit.first_frame
        origin = first_frame - past
        if entry is not None and (entry.keys() is not keys or entry.rows < decision.rows):
            entry = None
        if entry is None:
            if not grow:
                return None
            kind = decision.keys
            rows = max(decision.rows, _rows(keys, kind) if keys.dim() == 4 else 0)
            shape = (k.shape[0], rows, k.shape[2], k.shape[3])
            entry = _Entry(keys, torch.empty(shape, dtype=torch.float32, device=k.device))
        elif not (
            entry.version == visit.version
            and seen - visit.version <= 1
            and first_frame >= entry.first_frame
            and origin == entry.origin
        ):
            entry.frames = 0
        if entry.frames > past:
            entry.frames = past
        entry.first_frame, entry.origin, entry.version = first_frame, origin, None
        visit.entry, visit.seen = entry, seen
        self.entries[key] = entry
        if len(self.entries) > BUFFERS:
            self.entries.popitem(last=False)
        return entry

    def _change(self, visit):
        """Another graph is captured, or none any more: what the last one pooled is its own."""
        if visit.capture != self.capture:
            self.capture = visit.capture
            self.entries.clear()
        if visit.capture:
            _capture(visit.keys)

    def pool(self, visit, k, decision):
        """Means of all frames of ``k``, float32 ``[B, F*ceil(T/block), H, D]``, or None.

        A slice of a buffer that the next call with these keys writes again.
        """
        entry = self.enter(visit, k, decision)
        if entry is None:
            return None
        frame_tokens, block = decision.keys[-2:]
        frames, per_frame, kept = decision.frames, -(-frame_tokens // block), entry.frames
        ops.compress(
            k[:, kept * frame_tokens :],
            frame_tokens,
            block=block,
            out=entry.means[:, kept * per_frame : frames * per_frame],
        )
        entry.frames = frames
        return entry.means[:, : frames * per_frame]

    def leave(self, visit):
        """The forward ended without an error: what it pooled holds if it wrote nothing since."""
        entry, keys = visit.entry, visit.keys
        if entry is not None and keys._version == visit.seen:
            entry.version = visit.seen


def _rows(k, kind):
    frame_tokens, block = kind[-2:]
    return k.shape[1] // frame_tokens * -(-frame_tokens // block)


def address_inside(k, keys):
    """The address of ``k`` if it is a view of ``keys``, else 0."""
    if keys is None or k.untyped_storage().data_ptr() != keys.untyped_storage().data_ptr():
        return 0
    return k.data_ptr()
