"""Block means of past keys, kept from call to call where the keys never move.

Pooling the past again costs one read of all keys a call. Where a layer's keys are stored as
attention sees them, only the current chunk changes between two calls, so the means of the past
are kept: float32, one buffer for each key tensor. A kept mean is used only while all of this
holds, else the past is pooled again:

* the call's keys are a view of the same tensor object as before, at the same address and strides;
* its version counter (each in-place write of torch raises it, through any view) has not moved
  since the end of the last forward with it, and rose by at most one, the chunk's own write,
  from the start of this forward to its attention call. Moving the window takes two writes;
* the video went on: the first frame did not go back, and the frame at the start of the keys is
  the same frame of the video as before.

Tensors of inference mode have no version counter and are pooled in every call.
"""

import weakref
from collections import OrderedDict

import torch

from . import ops

BUFFERS = 4  # key tensors remembered a layer: two caches of guidance, and two rollouts


class _Entry:
    __slots__ = ("keys", "means", "frames", "first_frame", "origin", "version")

    def __init__(self, keys, means):
        self.keys = weakref.ref(keys)
        self.means = means  # float32 [B, frames * blocks, H, D]
        self.frames = 0  # of which so many hold
        self.first_frame = -1
        self.origin = None  # frame of the video at the start of the keys
        self.version = None  # None while a forward is in it, and for good if it raises


class KeyMeans:
    """The means of one layer's past keys, in at most :data:`BUFFERS` key tensors."""

    def __init__(self):
        """Empty."""
        self.entries = OrderedDict()

    @property
    def nbytes(self):
        """Bytes held."""
        return sum(e.means.nbytes for e in list(self.entries.values()))

    def pool(self, visit, k, frame_tokens, block, past):
        """Means of all frames of ``k``, or None where they cannot be kept.

        Args:
            visit: the running forward.
            k: ``[B, F*T, H, D]``, the keys of the call; T is ``frame_tokens``.
            frame_tokens: tokens of a frame.
            block: tokens of a mean.
            past: frames of ``k`` before the chunk's own.

        Returns:
            float32 ``[B, F*ceil(T/block), H, D]``, a slice of a buffer that the next call
            with these keys writes again.
        """
        entry = self._enter(visit, k, frame_tokens, block, past)
        if entry is None:
            return None
        frames, per_frame = k.shape[1] // frame_tokens, -(-frame_tokens // block)
        kept = entry.frames
        ops.compress(
            k[:, kept * frame_tokens :],
            frame_tokens,
            block=block,
            out=entry.means[:, kept * per_frame : frames * per_frame],
        )
        entry.frames = frames
        return entry.means[:, : frames * per_frame]

    def skip(self, visit, k, frame_tokens, block, past):
        """A dense call: the chunk's own keys were written and not pooled, the past still holds."""
        self._enter(visit, k, frame_tokens, block, past, grow=False)

    def leave(self, visit):
        """The forward ended without an error: what it pooled holds if it wrote nothing since."""
        entry, keys = visit.entry, visit.keys
        if entry is not None and keys._version == visit.seen:
            entry.version = visit.seen

    def _enter(self, visit, k, frame_tokens, block, past, grow=True):
        """The entry of these keys with ``frames`` cut to what holds, and closed until leave()."""
        keys = visit.keys
        if keys is None or not _is_view(k, keys):
            return None
        seen = keys._version
        stream = torch.cuda.current_stream(k.device).cuda_stream if k.is_cuda else 0
        key = (k.data_ptr(), k.stride(), k.shape[0], k.shape[2:], k.dtype, stream,
               frame_tokens, block)  # fmt: skip
        entry = self.entries.pop(key, None)
        if entry is not None and (entry.keys() is not keys or entry.means.shape[1] < _rows(k, key)):
            entry = None
        if entry is None and not grow:
            return None
        first_frame, origin = visit.first_frame, visit.first_frame - past
        if entry is None:
            rows = max(_rows(k, key), _rows(keys, key) if keys.dim() == 4 else 0)
            shape = (k.shape[0], rows, k.shape[2], k.shape[3])
            entry = _Entry(keys, torch.empty(shape, dtype=torch.float32, device=k.device))
        elif not (
            entry.version == visit.version
            and seen - visit.version <= 1
            and first_frame >= entry.first_frame
            and origin == entry.origin
        ):
            entry.frames = 0
        entry.frames = min(entry.frames, past)
        entry.first_frame, entry.origin, entry.version = first_frame, origin, None
        visit.entry, visit.seen = entry, seen
        self.entries[key] = entry
        while len(self.entries) > BUFFERS:
            self.entries.popitem(last=False)
        return entry


def _rows(k, key):
    frame_tokens, block = key[-2:]
    return k.shape[1] // frame_tokens * -(-frame_tokens // block)


def _is_view(k, keys):
    return k.untyped_storage().data_ptr() == keys.untyped_storage().data_ptr()
