"""Tensors made once for each device, and what CUDA graphs read of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

_read_by_graphs: dict[int, Any] = {}  # by id; for good, since nobody tells when a graph is gone


def _captures(device: Any) -> bool:
    import torch

    return torch.device(device).type != "cpu" and torch.cuda.is_current_stream_capturing()


def placed(x: Any, device: Any) -> Any:
    """A torch tensor of the host on ``device``, for caches that a warm-up fills.

    Raises:
        RuntimeError: a CUDA graph is captured, into which such a copy must not go.
    """
    if _captures(device):
        raise RuntimeError(
            "selector, layout, budget: expected the same call once before the capture of a CUDA "
            "graph, as a warm-up, got a first one inside"
        )
    return x.to(device)


def stay(found: Any, device: Any) -> Any:
    """``found`` itself, out of a cache; while a CUDA graph is captured, never to be freed again.

    A graph holds the address of what it reads and no reference: a cache that drops a tensor would
    have it read another one's memory.
    """
    if _captures(device):
        _read_by_graphs[id(found)] = found
    return found


def device_cache(maxsize: int) -> Callable:
    """:func:`functools.lru_cache` for functions whose last argument is the device of the result."""

    def decorate(make):
        cached = lru_cache(maxsize)(make)

        @wraps(make)
        def get(*arguments):
            return stay(cached(*arguments), arguments[-1])

        get.cache_clear = cached.cache_clear
        return get

    return decorate
