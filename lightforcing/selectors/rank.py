"""From scores to lists: the best blocks of every row, and the lists that never change.

Ties go to the lower index, -0 equals +0 and NaN ranks last, as in select_blocks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from ..arrays import is_torch, like
from ..blocks import BlockList
from .base import Geometry
from .placed import device_cache, placed, stay

CACHED = 64  # static lists kept: geometries x selectors in use


def as_torch(x: Any) -> Any:
    """The tensor itself, or one that shares the memory of a NumPy (or DLPack) array.

    Raises:
        ImportError: torch is not installed; selectors that look at q and k need it.
    """
    import torch

    if is_torch(x):
        return x.detach()
    return torch.from_numpy(x) if isinstance(x, np.ndarray) else torch.from_dlpack(x)


def kind_of(x: Any, model: Any) -> Any:
    """A torch tensor as the kind of ``model``: NumPy for NumPy."""
    if is_torch(model):
        return x
    if isinstance(model, np.ndarray):
        return x.numpy()
    return model.__array_namespace__().from_dlpack(x)


def top(scores: Any, geometry: Geometry, model: Any = None) -> BlockList:
    """The ``kept`` blocks of every row with the highest scores, ascending.

    Args:
        scores: ``[B, H, R, J]``, a torch tensor; -inf ranks before NaN only.
        geometry: its ``kept``, or ``kept_by_head``, says how many.
        model: the array whose kind the list gets; None leaves torch.
    """
    return take(ranking(scores), geometry, model)


def take(order: Any, geometry: Geometry, model: Any = None) -> BlockList:
    """The first blocks of each row of ``order`` [B, H, R, J], as many as the geometry says."""
    model = order if model is None else model
    counts = head_counts(geometry, order.shape[1], order.device)
    if counts is not None:
        counts = counts[:, None].expand(order.shape[:3])
        return first(order, counts, geometry, model, max(geometry.kept_by_head))
    indices = order[..., : geometry.kept].sort(-1).values.int().contiguous()
    return geometry.list(kind_of(indices, model))


def first(
    order: Any, counts: Any, geometry: Geometry, model: Any = None, width: int | None = None
) -> BlockList:
    """The first ``counts`` [B, H, R] blocks of each row of ``order`` [B, H, R, J].

    ``width`` is the largest count; None asks the device for it, and waits.
    """
    import torch

    width = max(1, int(counts.max())) if width is None else width
    order = order[..., :width]
    beyond = torch.arange(width, device=order.device) >= counts[..., None]
    indices = order.masked_fill(beyond, geometry.blocks).sort(-1).values
    indices = indices.masked_fill(indices == geometry.blocks, 0).int().contiguous()
    model = order if model is None else model
    counts = counts.int().contiguous()
    return geometry.list(kind_of(indices, model), kind_of(counts, model))


def ranking(scores: Any) -> Any:
    """Blocks from best to worst, int64 ``[.., J]``."""
    import torch

    # Every finite or infinite score beats NaN: rank in a key that moves -inf up by one step.
    low = torch.finfo(scores.dtype).min
    scores = torch.where(torch.isneginf(scores), low, scores)
    scores = torch.where(scores.isnan(), -torch.inf, scores) + 0.0  # and -0 is +0
    return scores.sort(dim=-1, descending=True, stable=True).indices


def head_counts(geometry: Geometry, heads: int, device: Any) -> Any:
    """int64 ``[H]`` kept blocks of each head, or None where all keep the same.

    Raises:
        ValueError: ``kept_by_head`` is for another number of heads.
    """
    by_head = geometry.kept_by_head
    if by_head is None:
        return None
    if len(by_head) != heads:
        raise ValueError(f"budget: expected shares for {heads} heads, got {len(by_head)}")
    return counts_on(by_head, device)


@device_cache(maxsize=256)
def counts_on(counts: tuple[int, ...], device: Any) -> Any:
    """Int64 tensor of ``counts`` on ``device``, made once."""
    import torch

    return placed(torch.tensor(counts), device)


class Static:
    """A selector that never looks at q and k: one list per geometry, made once.

    A subclass is a frozen dataclass with ``costs(geometry)``: ``[R, J]`` or ``[H, R, J]`` numbers,
    lowest first, of which each row takes ``kept``; or, where it has a rule of its own for how many,
    ``own(geometry)``: a bool map of that shape, or None to go by costs.
    """

    needs_grid = True
    exact = True

    def costs(self, geometry: Geometry, heads: int) -> np.ndarray:
        """What it would cost a row to leave a block in; see the class."""
        raise NotImplementedError

    def own(self, geometry: Geometry) -> np.ndarray | None:
        """The source's own choice, whatever the schedule says; None: by costs."""
        return None

    def key(self, geometry: Geometry) -> Geometry:
        """What of the geometry the list depends on."""
        return geometry.static()

    def select(self, q: Any, k: Any, geometry: Geometry) -> BlockList:
        """The list of this geometry; see :class:`lightforcing.selectors.Selector`."""
        place = str(q.device) if hasattr(q, "device") else ""
        batch, heads = q.shape[0], q.shape[2]
        key = (self, self.key(geometry), batch, heads, type(q), place)
        found = _cached(key, lambda: self._make(q, geometry, batch, heads))
        return stay(found, q.device) if is_torch(q) else found

    def _make(self, q, geometry, batch, heads):
        kept = self.own(geometry)
        if kept is None:
            kept = _cheapest(self.costs(geometry, heads), geometry, heads)
        kept = np.broadcast_to(kept, (batch, heads, *kept.shape[-2:]))
        order = np.argsort(~kept, axis=-1, kind="stable")
        counts = kept.sum(-1, dtype=np.int32)
        width = int(counts.max(initial=1))
        indices = order[..., :width].astype(np.int32)
        if (counts == width).all():
            return geometry.list(_like(indices, q))
        indices *= np.arange(width) < counts[..., None]
        return geometry.list(_like(indices, q), _like(counts, q))


def _cheapest(costs: np.ndarray, geometry: Geometry, heads: int) -> np.ndarray:
    order = np.argsort(costs, axis=-1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(costs.shape[-1]), -1)
    by_head = geometry.kept_by_head
    if by_head is None:
        return rank < geometry.kept
    if len(by_head) != heads:
        raise ValueError(f"budget: expected shares for {heads} heads, got {len(by_head)}")
    return rank < np.array(by_head)[:, None, None]


def _like(x: np.ndarray, model: Any) -> Any:
    x = np.ascontiguousarray(x)
    return placed(as_torch(x), model.device) if is_torch(model) else like(x, model)


_lists: OrderedDict[Any, BlockList] = OrderedDict()


def _cached(key: Any, make: Callable[[], BlockList]) -> BlockList:
    found = _lists.pop(key, None)
    if found is None:
        found = make()
    _lists[key] = found
    while len(_lists) > CACHED:
        _lists.popitem(last=False)
    return found


def forget() -> None:
    """Drop all cached static lists, but for those that a CUDA graph reads."""
    _lists.clear()


class Scored:
    """A selector that ranks key blocks by a score of q and k, in torch.

    A subclass is a frozen dataclass with ``scores(q, k, geometry)``.
    """

    needs_grid = False
    exact = True

    def scores(self, q: Any, k: Any, geometry: Geometry) -> Any:
        """Torch ``[B, H, R, J]``, higher is better."""
        raise NotImplementedError

    def select(self, q: Any, k: Any, geometry: Geometry) -> BlockList:
        """The best blocks of every row; see :class:`lightforcing.selectors.Selector`."""
        return top(self.scores(as_torch(q), as_torch(k), geometry), geometry, q)


def block_means(x: Any, block: int, frame_tokens: int | None = None) -> Any:
    """Float32 means of blocks of ``block`` tokens: ``[B, L, H, D] -> [B, H, n, D]``, in torch.

    Blocks restart every ``frame_tokens`` tokens (None: never); the last one of each may be short.
    """
    import torch

    tokens = x.shape[1] if frame_tokens is None else frame_tokens
    frames, per_frame = x.shape[1] // tokens, -(-tokens // block)
    full = tokens // block
    x = x.unflatten(1, (frames, tokens))
    parts = []
    if full:
        parts.append(x[:, :, : full * block].unflatten(2, (full, block)).float().mean(3))
    if full < per_frame:
        parts.append(x[:, :, full * block :].float().mean(2, keepdim=True))
    return torch.cat(parts, 2).flatten(1, 2).transpose(1, 2)


def mean_scores(q: Any, k: Any, geometry: Geometry) -> Any:
    """``<mean of q rows, mean of k rows>`` of every pair of blocks: ``[B, H, R, J]``."""
    qm = block_means(q, geometry.block_q)
    return qm @ block_means(k, geometry.block_k, geometry.frame_tokens).mT
