"""What a handle does for settings that are not plain: selectors, budgets, shared lists, layouts."""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict
from typing import Any

import numpy as np

from .base import Geometry, token_places
from .builtin import Hsa, Lse, Mass, Mean
from .placed import device_cache, placed

BUFFERS = 4  # lists remembered a layer: two caches of guidance, and two rollouts


class Chooser:
    """The lists of one handle: which selector, which budget, and which list is used again.

    A list is used again only within one CUDA graph, or outside all: a graph that read a list from
    outside would replay it for other videos, and a graph's own list is unwritten before a replay.
    """

    def __init__(self):
        """Nothing remembered."""
        self._lists = defaultdict(OrderedDict)  # by layer: cache -> (key, step, list, density)
        self._lock = threading.Lock()

    def shared(self, config, visit, q, k):
        """The list and density of an earlier step of this chunk, if it may be used again."""
        if config.refresh == 1:
            return None
        with self._lock:
            key, step, *found = self._lists[visit.hook.layer].get(visit.call.cache, (None, 0))
        fits = key == (visit.first_frame, q.shape, k.shape, visit.capture)
        return found if fits and step < visit.step < step + config.refresh else None

    def keep(self, config, visit, q, k, blocks, density):
        """Remember a list for the steps that follow."""
        if config.refresh == 1:
            return
        with self._lock:
            lists = self._lists[visit.hook.layer]
            lists.pop(visit.call.cache, None)
            key = visit.first_frame, q.shape, k.shape, visit.capture
            lists[visit.call.cache] = key, visit.step, blocks, density
            while len(lists) > BUFFERS:
                lists.popitem(last=False)

    def select(self, config, visit, place, kept, q, k):
        """A new list and its density by the selector and the budget of the settings.

        Returns:
            The list; and the share of key blocks kept: a number, or, where only the device knows
            it, a tensor of one element.
        """
        selector = selector_of(config)
        geometry = self.geometry(config, visit, place, kept)
        blocks = selector.select(q, k, geometry)
        if selector.exact:
            by_head = geometry.kept_by_head
            mean = geometry.kept if by_head is None else sum(by_head) / len(by_head)
            return blocks, mean / geometry.blocks
        density = blocks.counts.double().mean() / geometry.blocks
        return blocks, density if density.is_cuda else float(density)

    @staticmethod
    def geometry(config, visit, place, kept):
        """The call as a selector sees it."""
        layer, by_head, blocks = visit.hook.layer, None, None
        call = visit.call
        if config.budget is not None:
            shares = config.budget.shares
            if layer >= len(shares):
                raise ValueError(
                    f"budget: expected shares for layer {layer} as well, got {len(shares)} layers"
                )
            blocks = (place.past + place.query) * -(-place.frame_tokens // config.block_k)
            by_head = tuple(config.budget.counts(kept, blocks)[layer].tolist())
        return geometry_of(
            config,
            frame_tokens=place.frame_tokens,
            q_frames=place.query,
            k_frames=place.query + place.past,
            kept=kept,
            grid=call.grid,
            order=call.order,
            first_frame=visit.first_frame,
            sink_frames=call.sink,
            chunk=place.chunk,
            layer=layer,
            step=visit.step,
            kept_by_head=by_head,
        )


def selector_of(config):
    """The selector of the settings, or the object that score and hierarchy stand for."""
    if config.selector is not None:
        return config.selector
    if config.hierarchy:
        return Hsa(score=config.score)
    return {"mean": Mean, "mass": Mass, "lse": Lse}[config.score]()


def geometry_of(config, *, grid, order, **facts):
    """A call as a selector sees it: the settings where they say something, else its facts."""
    order = config.token_order or order
    if config.layout is not None:
        order = {"tiles": "morton"}.get(config.layout, config.layout)
    return Geometry(
        block_q=config.block_q,
        block_k=config.block_k,
        grid=config.grid or grid,
        order=order,
        **facts,
    )


def grid_of(config, visit):
    """Rows and columns of a frame, from the settings or the call; None where neither tells."""
    return config.grid or (visit.call.grid if visit.call is not None else None)


def needs_grid(config):
    """Do the settings ask for the grid of a frame?"""
    selector = config.selector
    return config.layout is not None or (selector is not None and selector.needs_grid)


def layout(config, visit, *tensors: Any):
    """The tensors with each frame's tokens in the layout of the settings, and the way back.

    Returns:
        The tensors, and a function that brings what has L tokens in that layout, in the dimension
        given as its second argument, to the model's own; the tensors themselves and None where
        nothing moves.
    """
    target = {"tiles": "morton"}.get(config.layout, config.layout)
    order = config.token_order or visit.call.order
    if target is None or target == order:
        return tensors, None
    there, back = _permutation(grid_of(config, visit), order, target, tensors[0].device)
    moved = tuple(_move(x, there, 1) for x in tensors)
    return moved, lambda x, dim: _move(x, back, dim)


def _move(x, order, dim):
    frames = x.unflatten(dim, (-1, len(order)))
    return frames.index_select(dim + 1, order).flatten(dim, dim + 1)


@device_cache(maxsize=32)
def _permutation(grid, order, target, device):
    import torch

    rank = np.empty(grid[0] * grid[1], np.int64)  # of a place, in raster order, among the tokens
    rank[token_places(*grid, order) @ (grid[1], 1)] = np.arange(len(rank))
    there = torch.from_numpy(rank[token_places(*grid, target) @ (grid[1], 1)])
    return placed(there, device), placed(there.argsort(), device)
