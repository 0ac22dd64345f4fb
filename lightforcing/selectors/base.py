"""What a selector is, what it is told, and the names selectors have.

A selector says *which* key blocks a query block reads; the schedule says *how many*
(:attr:`Geometry.kept`). Each is a small frozen dataclass whose fields are its options, so it can be
compared, kept as a key of a cache and written to JSON. Importing this module needs no torch.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ..blocks import BlockList, frame_blocks

ORDERS = ("raster", "morton")


@dataclass(frozen=True)
class Geometry:
    """One attention call: its sizes, its place in the video and its budget.

    Attributes:
        frame_tokens: T, tokens of a latent frame.
        q_frames: f, frames of the query; the last ones of the keys.
        k_frames: F, resident frames, oldest first.
        kept: key blocks that a row keeps, 1 to J.
        block_q: query rows that share a list.
        block_k: tokens of a key block.
        grid: rows and columns of a frame's tokens; None where nobody told.
        order: ``raster``, or ``morton``: tokens in Z order, the column in the lowest bit, so that
            64 consecutive tokens are an 8 x 8 tile.
        first_frame: first query frame counted over the video; None is ``k_frames - q_frames``.
        sink_frames: first resident frames that a rolling window never drops.
        chunk: number of the chunk, from 1.
        layer: number of the layer, from 0.
        step: denoising step of the chunk, from 0.
        scale: of the logits; None is ``D ** -0.5``.
        kept_by_head: blocks of each head, in place of ``kept``; see :class:`Budget`.
    """

    frame_tokens: int
    q_frames: int
    k_frames: int
    kept: int
    block_q: int = 128
    block_k: int = 64
    grid: tuple[int, int] | None = None
    order: str = "raster"
    first_frame: int | None = None
    sink_frames: int = 0
    chunk: int = 1
    layer: int = 0
    step: int = 0
    scale: float | None = None
    kept_by_head: tuple[int, ...] | None = None

    def __post_init__(self):
        """Check what a caller can get wrong."""
        for name in ("frame_tokens", "block_q", "block_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        if not 1 <= self.q_frames <= self.k_frames:
            raise ValueError(
                f"q_frames: expected 1 to k_frames = {self.k_frames}, got {self.q_frames}"
            )
        if not 1 <= self.kept <= self.blocks:
            raise ValueError(f"kept: expected 1 to J = {self.blocks}, got {self.kept}")
        if self.order not in ORDERS:
            raise ValueError(f"order: expected one of {', '.join(ORDERS)}, got {self.order!r}")
        if self.grid is not None and math.prod(self.grid) != self.frame_tokens:
            raise ValueError(
                f"grid: expected rows x columns = {self.frame_tokens} tokens, got {self.grid}"
            )

    @property
    def past(self) -> int:
        """P, frames before the query."""
        return self.k_frames - self.q_frames

    @property
    def per_frame(self) -> int:
        """Key blocks of a frame."""
        return frame_blocks(self.frame_tokens, self.block_k)

    @property
    def blocks(self) -> int:
        """J, all key blocks."""
        return self.k_frames * self.per_frame

    @property
    def q_len(self) -> int:
        """Lq, query tokens."""
        return self.q_frames * self.frame_tokens

    @property
    def k_len(self) -> int:
        """Lk, key tokens."""
        return self.k_frames * self.frame_tokens

    @property
    def rows(self) -> int:
        """R, query blocks."""
        return frame_blocks(self.q_len, self.block_q)

    def static(self) -> Geometry:
        """The same call without what a static list does not depend on: one key for the cache."""
        first = self.past if self.first_frame is None else self.first_frame
        return dataclasses.replace(self, first_frame=first, chunk=1, layer=0, step=0, scale=None)

    @cached_property
    def ages(self) -> np.ndarray:
        """int64 ``[F]``: frames of the video between each resident frame and the last one.

        The last resident frames are consecutive. Where more of the video has been seen than is
        resident, the first ``sink_frames`` are frames 0, 1 ... of the video.
        """
        ages = np.arange(self.k_frames)[::-1].copy()
        last = (self.past if self.first_frame is None else self.first_frame) + self.q_frames - 1
        sink = min(self.sink_frames, self.past)
        if last >= self.k_frames and sink:
            ages[:sink] = last - np.arange(sink)
        return ages

    @property
    def block_frames(self) -> np.ndarray:
        """int64 ``[J]``: the resident frame of every key block."""
        return np.repeat(np.arange(self.k_frames), self.per_frame)

    def list(self, indices: Any, counts: Any = None) -> BlockList:
        """A :class:`BlockList` of this geometry; rows without ``counts`` are full."""
        sizes = (self.q_len, self.k_len, self.frame_tokens, self.block_q, self.block_k)
        if counts is None:
            return BlockList.full_rows(indices, *sizes)
        return BlockList(indices, counts, *sizes)


@lru_cache(maxsize=32)
def token_places(rows: int, columns: int, order: str = "raster") -> np.ndarray:
    """int64 ``[T, 2]``: row and column of every token of a frame, in its order.

    ``morton`` sorts by the bits of row and column taken in turn, the column's lowest first; on a
    grid that is no power of two the places outside it are skipped.
    """
    place = np.stack(np.divmod(np.arange(rows * columns), columns), 1)
    if order == "raster":
        return place
    code = np.zeros(rows * columns, np.int64)
    for bit in range(max(rows, columns).bit_length()):
        code |= (place[:, 1] >> bit & 1) << 2 * bit | (place[:, 0] >> bit & 1) << 2 * bit + 1
    return place[np.argsort(code, kind="stable")]


@runtime_checkable
class Selector(Protocol):
    """Anything with these: ``lightforcing.patch(model, selector=...)`` takes it.

    Attributes:
        name: how tables and reports call it.
        notes: one sentence: where the rule comes from and how ours deviates; "" for none.
        needs_grid: whether it cannot work where ``geometry.grid`` is None.
        exact: whether every row keeps exactly what the schedule says.
    """

    name: str
    notes: str
    needs_grid: bool
    exact: bool

    def select(self, q: Any, k: Any, geometry: Geometry) -> BlockList:
        """The key blocks of every query block.

        Args:
            q: ``[B, Lq, H, D]`` after RoPE: the last Lq tokens of the key sequence.
            k: ``[B, Lk, H, D]``, F whole frames, oldest first; dtype and device of ``q``.
            geometry: sizes, place and budget of the call.

        Returns:
            A list of this geometry, ascending in every row, of the kind and device of ``q``.
        """
        ...


_factories: dict[str, Any] = {}


def register(factory: Any, name: str | None = None) -> Any:
    """Give a selector a name; the last registration of a name holds. Returns ``factory``.

    Args:
        factory: called with the options, gives a :class:`Selector`; a class, usually.
        name: None takes ``factory.name``.

    Raises:
        TypeError: ``factory`` is not callable, or there is no name.
    """
    name = getattr(factory, "name", None) if name is None else name
    if not callable(factory) or not isinstance(name, str) or not name:
        raise TypeError(
            f"factory: expected something to call and a name, got {factory!r}, {name!r}"
        )
    _factories[name] = factory
    return factory


def names() -> list[str]:
    """All registered names, in the order of their registration."""
    return list(_factories)


def make(selector: Any, **options: Any) -> Selector:
    """The selector of a name, of a dict that :func:`to_dict` wrote, or the object itself.

    Raises:
        ValueError: no selector of this name. TypeError: an option it does not have, or an object
        that is no selector.
    """
    if isinstance(selector, dict):
        options = {**{k: v for k, v in selector.items() if k != "name"}, **options}
        selector = selector.get("name")
    if isinstance(selector, str):
        if selector not in _factories:
            raise ValueError(f"selector: expected one of {', '.join(_factories)}, got {selector!r}")
        factory = _factories[selector]
        if isinstance(factory, type) and dataclasses.is_dataclass(factory):
            known = [field.name for field in dataclasses.fields(factory)]
            if unknown := [name for name in options if name not in known]:
                raise TypeError(
                    f"selector: expected options of {selector}, {', '.join(known) or 'none'}, "
                    f"got {', '.join(unknown)}"
                )
        return factory(**options)
    if isinstance(selector, type) or not isinstance(selector, Selector):
        raise TypeError(
            "selector: expected a name or an object with name, notes, needs_grid, exact and "
            f"select(q, k, geometry), got {selector!r}"
        )
    if options:
        raise TypeError(f"selector: expected no options beside an object, got {sorted(options)}")
    return selector


def to_dict(selector: Selector) -> dict:
    """Name and options, JSON-ready; :func:`make` takes them back."""
    values = dataclasses.asdict(selector) if dataclasses.is_dataclass(selector) else {}
    return {"name": selector.name} | {
        k: list(v) if isinstance(v, tuple) else v for k, v in values.items()
    }
