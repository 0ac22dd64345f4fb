"""What happened: counters by layer and chunk, milliseconds and recall.

No call waits for a device: CUDA calls are timed by events, which are read when they have ended or
when somebody reads the figures. Calls that go into a CUDA graph are counted, neither timed nor
probed.

Recall means stay tensors until somebody reads them. Chunks past :data:`LAST_CHUNK` share one
cell, so that an endless stream does not grow the table.
"""

import threading
import time
from collections import Counter

LAST_CHUNK = 255
PENDING = 512  # CUDA timings whose events have not been read


class Cell:
    """Sums over the calls of one layer in one chunk."""

    __slots__ = (
        "calls", "sparse_calls", "pairs", "kept_pairs", "kept_on_device", "sparsity", "keep_frames",
        "dense", "dense_seconds", "sparse_seconds", "recall", "recall_low", "recalled",
    )  # fmt: skip

    def __init__(self):
        """All zero."""
        self.calls = self.sparse_calls = self.recalled = 0
        self.pairs = self.kept_pairs = 0  # query-key pairs a head: resident, computed
        self.kept_on_device = 0  # of the computed, what only the device knows: no graph adds to it
        self.sparsity = None  # of the schedule, at the last sparse call
        self.keep_frames = 0  # the most that a call had to raise it to
        self.dense = Counter()
        self.dense_seconds = self.sparse_seconds = 0.0
        self.recall = self.recall_low = 0.0

    def add(self, other):
        """Sum in another cell."""
        for name in ("calls", "sparse_calls", "pairs", "kept_pairs", "kept_on_device",
                     "dense_seconds", "sparse_seconds", "recall", "recall_low",
                     "recalled"):  # fmt: skip
            setattr(self, name, getattr(self, name) + getattr(other, name))
        if other.sparsity is not None:
            self.sparsity = other.sparsity
        self.keep_frames = max(self.keep_frames, other.keep_frames)
        self.dense += other.dense

    def to_dict(self, timing=False):
        """JSON-ready; density, ms and recall are None where nothing was measured."""
        kept = self.kept_pairs + float(self.kept_on_device)
        values = {
            "calls": self.calls,
            "sparse_calls": self.sparse_calls,
            "sparsity": self.sparsity,
            "density": kept / self.pairs if self.pairs else None,
            "dense": dict(self.dense),
            "recall": float(self.recall) / self.recalled if self.recalled else None,
            "recall_p5": float(self.recall_low) / self.recalled if self.recalled else None,
            "ms": None,
        }
        if self.keep_frames:
            values["keep_frames"] = self.keep_frames
        if timing:
            values["ms"] = 1e3 * (self.dense_seconds + self.sparse_seconds)
            values["dense_ms"] = 1e3 * self.dense_seconds
            values["sparse_ms"] = 1e3 * self.sparse_seconds
        return values


class Timer:
    """Seconds of one call: the host's clock on the CPU, two events on a CUDA stream.

    Neither on a stream that is captured: its events hold no time, and to ask them is an error.
    """

    def __init__(self, x):
        """Starts now; the device of ``x``, the query, decides how."""
        self.events = self.seconds = None
        self._start = 0.0
        if x.is_cuda:
            import torch

            if torch.cuda.is_current_stream_capturing():
                return
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._stream = torch.cuda.current_stream(x.device)
            self.events[0].record(self._stream)
        elif x.device.type == "cpu":
            self.seconds, self._start = 0.0, time.perf_counter()

    def stop(self):
        """The call was made; on CUDA it may still run, and nothing waits for it."""
        if self.events is not None:
            self.events[1].record(self._stream)
        elif self.seconds is not None:
            self.seconds = time.perf_counter() - self._start
        return self


class Record:
    """All cells of a handle, and the clock of whole steps."""

    def __init__(self):
        """No calls yet."""
        self._lock = threading.Lock()
        self._thread = threading.local()
        self.cells = {}  # (layer, chunk or None) -> Cell
        self._pending = []  # (cell, field, events) of CUDA calls
        self.wall = self.attention = self.dense_equivalent = 0.0  # seconds in whole steps
        self.steps = 0

    def dense(self, layer, chunk, reason, pairs=0, timer=None):
        """A call went through the original function."""
        with self._lock:
            cell = self._cell(layer, chunk)
            cell.calls += 1
            cell.dense[reason] += 1
            cell.pairs += pairs
            cell.kept_pairs += pairs
            if timer is not None:
                self._time(cell, "dense_seconds", timer, 1.0)

    def sparse(self, layer, call, density, timer, recall):
        """A call ran sparse.

        Args:
            layer: its number.
            call: what it came to, a :class:`lightforcing.decide.Decision`.
            density: share of the pairs that were computed; a number, or a tensor of one element.
            timer: its :class:`Timer`, or None.
            recall: None, or a pair of one-element tensors, mean and 5th percentile.
        """
        with self._lock:
            if isinstance(density, (int, float)):
                cell = self._ran_sparse(layer, call, call.pairs * density)
            else:
                cell = self._ran_sparse(layer, call, 0)
                cell.kept_on_device = cell.kept_on_device + call.pairs * density
            if timer is not None:
                self._time(cell, "sparse_seconds", timer, density)
            if recall is not None:
                cell.recall = cell.recall + recall[0]
                cell.recall_low = cell.recall_low + recall[1]
                cell.recalled += 1

    def plain(self, layer, call):
        """A call ran sparse as it was decided, neither timed nor probed: what most calls are."""
        with self._lock:
            self._ran_sparse(layer, call, call.pairs * call.density)

    def _ran_sparse(self, layer, call, kept_pairs):
        cell = self._cell(layer, call.chunk)
        cell.calls += 1
        cell.sparse_calls += 1
        cell.sparsity = call.sparsity
        cell.pairs += call.pairs
        cell.kept_pairs += kept_pairs
        if call.raised > cell.keep_frames:
            cell.keep_frames = call.raised
        return cell

    def _time(self, cell, field, timer, density):
        if timer.events is not None:
            self._pending.append((cell, field, timer.events))
            if len(self._pending) > PENDING:
                self._read_events(wait=False)
        elif timer.seconds is not None:
            setattr(cell, field, getattr(cell, field) + timer.seconds)
            self._spend(timer.seconds, timer.seconds / density)

    def _read_events(self, wait):
        """Adds up the CUDA calls that have ended; with ``wait``, those that still run too."""
        still = []
        for cell, field, (start, end) in self._pending:
            if wait:
                end.synchronize()
            if wait or end.query():
                seconds = start.elapsed_time(end) * 1e-3
                setattr(cell, field, getattr(cell, field) + seconds)
            else:
                still.append((cell, field, (start, end)))
        self._pending = still

    def settle(self):
        """Wait for the timed CUDA calls and add them up; only the reader of the figures waits."""
        with self._lock:
            self._read_events(wait=True)

    def note(self, layer, chunk, reason):
        """A forward that made no attention call, and why."""
        with self._lock:
            self._cell(layer, chunk).dense[reason] += 1

    def _cell(self, layer, chunk):
        key = (layer, chunk if chunk is None or chunk < LAST_CHUNK else LAST_CHUNK)
        cell = self.cells.get(key)
        if cell is None:
            cell = self.cells[key] = Cell()
        return cell

    # A step runs from one entry of the first layer to the next at the same place of the video, in
    # one thread: between two chunks a pipeline may decode, which is no part of a step.

    def tick(self, first_frame, repeated):
        """The first layer was entered; `repeated`: a forward at this place came before.

        Closes the step before, unless another chunk began.
        """
        now, step = time.perf_counter(), self._thread
        began = getattr(step, "began", None)
        same = repeated and began is not None and first_frame == step.first_frame
        if same and step.attention > 0:
            with self._lock:
                self.wall += now - began
                self.attention += step.attention
                self.dense_equivalent += step.dense_equivalent
                self.steps += 1
        step.began, step.first_frame = now, first_frame
        step.attention = step.dense_equivalent = 0.0

    def _spend(self, seconds, dense_equivalent):
        if hasattr(self._thread, "began"):
            self._thread.attention += seconds
            self._thread.dense_equivalent += dense_equivalent

    @property
    def attention_share(self):
        """Attention in whole steps as they ran, of their wall time; a chunk's last is not counted.

        None before a step ended, and on CUDA, where the host's clock does not see a step's end.
        """
        with self._lock:
            return self.attention / self.wall if self.steps else None

    @property
    def dense_attention_share(self):
        """The same share had every call been dense: a sparse call counts seconds / density."""
        with self._lock:
            wall = self.wall - self.attention + self.dense_equivalent
            return self.dense_equivalent / wall if self.steps else None

    def snapshot(self):
        """Copies of all cells at one moment, by (layer, chunk), the unknown chunk last."""
        with self._lock:
            cells = {key: total([cell]) for key, cell in self.cells.items()}
        return dict(sorted(cells.items(), key=lambda x: (x[0][1] is None, x[0][1] or 0, x[0][0])))


def total(cells):
    """One cell, the sum of others."""
    summed = Cell()
    for cell in cells:
        summed.add(cell)
    return summed
