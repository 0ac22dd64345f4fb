"""How a call runs sparse, once it is decided: in one call of the core where that can be."""

from collections import defaultdict

import torch

from . import ops
from .means import KeyMeans
from .selectors.choose import Chooser, layout
from .stats import Timer


class Sparse:
    """The sparse calls of one model, and what they keep from call to call.

    Attributes:
        means: cached means of past keys, by layer.
        chooser: lists that later steps use again.
        spare: workspaces, by stream.
    """

    def __init__(self, config):
        """With these settings; nothing kept yet."""
        self._config = config
        self.means = defaultdict(KeyMeans)
        self.chooser = Chooser()
        self.spare = {}

    @property
    def nbytes(self):
        """Bytes of cached means."""
        return sum(m.nbytes for m in list(self.means.values()))

    def forget(self):
        """Give the memory back."""
        self.means.clear()
        self.spare.clear()

    def run(self, visit, decision, q, k, v):
        """A sparse call, measured as the settings ask.

        Returns:
            ``(out, density, timer or None, recall or None)``, as
            :meth:`lightforcing.stats.Record.sparse` takes them.
        """
        timer = timer_of(self._config, visit, q)
        density, captured = decision.density, visit.capture != 0
        probed = self._config.probe > 0 and not captured
        if decision.step is None:
            out, lse, density = self._apart(visit, decision, q, k, v, probed)
            if captured and isinstance(density, torch.Tensor):  # unwritten before a replay
                density = decision.density
        else:
            out, lse = self.whole(visit, decision, q, k, v, probed)
        if timer is not None:
            timer.stop()
        recall = None if lse is None else self._recall(visit, q, k, v, lse)
        return out, density, timer, recall

    def whole(self, visit, decision, q, k, v, want_lse):
        """A sparse call in one call of the core: ``(out, lse or None)``."""
        entry = self.means[visit.hook.layer].enter(visit, k, decision)
        run, fresh = decision.step.run, visit.capture != 0
        if entry is None:
            out, lse, _ = run(q, k, v, None, 0, want_lse, fresh)
        else:
            out, lse, _ = run(q, k, v, entry.means, entry.frames, want_lse, fresh)
            entry.frames = decision.frames
        return out, lse

    def _apart(self, visit, decision, q, k, v, probed):
        """A sparse call of several operators: another selector, layout, or kind of tensor."""
        (q, k, v), back = layout(self._config, visit, q, k, v)
        blocks, density = self._choose(visit, decision, q, k)
        out = ops.block_sparse_attention(q, k, v, blocks, return_lse=probed)
        out, lse = out if probed else (out, None)
        if back is not None:
            out, lse = back(out, 1), None if lse is None else back(lse, 2)
        return out, lse, density

    def _choose(self, visit, decision, q, k):
        """The list of such a call, and its share of the blocks."""
        config, means = self._config, self.means[visit.hook.layer]
        found = self.chooser.shared(config, visit, q, k)
        own = config.selector is not None or config.budget is not None
        if found is not None or own:
            means.enter(visit, k, decision, grow=False)
        if found is not None:
            return found
        if own:
            found = self.chooser.select(config, visit, decision, decision.kept, q, k)
        else:
            blocks = ops.select_blocks(
                q,
                k,
                frame_tokens=decision.frame_tokens,
                sparsity=decision.asked,
                k_means=means.pool(visit, k, decision),
                **config.selection(),
            )
            found = blocks, decision.density
        self.chooser.keep(config, visit, q, k, *found)
        return found

    def _recall(self, visit, q, k, v, lse):
        """Mean and 5th percentile of the recall of evenly spaced query rows, as tensors."""
        count = min(self._config.probe, q.shape[1])
        stride = q.shape[1] // count
        first = visit.step * 7919 % stride  # other rows in every step
        rows = slice(first, first + stride * (count - 1) + 1, stride)
        _, dense = ops.block_sparse_attention(q[:, rows], k, v, return_lse=True)
        recall = (lse[:, :, rows] - dense).exp().flatten()
        return recall.mean(), recall.quantile(0.05)


def timer_of(config, visit, q):
    """The started timer of a call, or None where none is wanted or none can run."""
    return Timer(q) if config.timing and not visit.capture else None
