"""All settings of a patched model in one frozen value, and the presets by name."""

import difflib
import json
import math
import operator
from dataclasses import dataclass, fields, replace
from typing import Any

from .schedule import LAWS

FLAT = ("constant", "count")  # laws without a base
SCORES = ("mean", "mass", "lse")

# What select_blocks is told beside the call's own frame size and sparsity.
SELECTION = ("score", "hierarchy", "keep_frames", "sink_frames", "near_frames", "block_q",
             "block_k")  # fmt: skip

# Selectors that select_blocks is: by name the score and whether frames are chosen first.
BUILT_IN = {
    "hsa": ("mean", True),
    "mean": ("mean", False),
    "mass": ("mass", False),
    "lse": ("lse", False),
}

# The last denoising step makes the picture: with it alone dense, most of what sparse attention
# costs is gone, with the first one alone nothing (benchmarks/results/quality.md).
BY_STEP = (0.1, 0.6, 1, 2.6, 0.7)
# paper, paper-long: the published schedules and rule. The other three keep the same number of
# blocks in every chunk, most of them in the last denoising step, and rank them by estimated mass.
PRESETS = {
    "paper": {"sparsity": 0.88, "base": 0.98, "law": "linear", "score": "mean", "hierarchy": True},
    "paper-long": {
        "sparsity": 0.85,
        "base": 0.95,
        "law": "linear",
        "window": 12,
        "score": "mean",
        "hierarchy": True,
        "keep_frames": 3,
        "sink_frames": 1,
        "near_frames": 1,
    },
    **{
        name: {
            "sparsity": sparsity,
            "law": "count",
            "score": "mass",
            "hierarchy": False,
            "step_share": BY_STEP,
        }
        for name, sparsity in (("quality", 0.70), ("balanced", 0.80), ("fast", 0.88))
    },
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of :func:`lightforcing.patch`; the defaults are ``balanced`` without step_share.

    Args:
        sparsity: share of query-key pairs not attended, averaged over the chunks that are not
            dense and weighted by resident frames; in [0, 1). 0 leaves every call dense.
        base: sparsity that the growth laws ``linear`` and ``exponential`` approach; None is
            ``min(1, sparsity + 0.10)``. The other two laws take none.
        law: ``linear``, ``exponential``, ``constant`` or ``count``, see :func:`cag_schedule`.
        schedule: sparsity of every chunk, in place of the solved one.
        num_frames: planned length in latent frames; None plans 21, or 63 with a window.
        frames_per_chunk: None takes the model's ``num_frame_per_block``, else the shortest query
            seen, else 3.
        chunk_ends: frames of the video at the end of each planned chunk, when chunks differ.
        dense_frames: calls with fewer frames before them are dense; None is frames_per_chunk, or
            0 with a given schedule.
        window: most resident frames; None takes the layer's ``local_attn_size`` if it is positive.
        frame_tokens: tokens of a frame, for models whose layers are not told their grid.
        grid: rows and columns of a frame's tokens, likewise; only some selectors ask for it.
        token_order: ``raster`` or ``morton``; None takes the layer's ``token_order``, else raster.
        selector: which key blocks a query block reads: a name of
            :func:`lightforcing.selectors.names` or an object of its protocol, in place of score
            and hierarchy. The names ``hsa``, ``mean``, ``mass`` and ``lse`` set these two instead.
        score: how key blocks are ranked: ``mean``, ``mass`` or ``lse``.
        hierarchy: choose frames first, then blocks inside them.
        keep_frames: past frames that stay candidates for each query block (hierarchy only).
        sink_frames: first frames that always are among them.
        near_frames: last past frames that always are among them.
        block_q: query rows that share one list; 16 to 128.
        block_k: tokens of a key block; 16, 32, 64 or 128.
        refresh: denoising steps of a chunk that share one list; 1 makes a list every step. Steps
            are counted from the first forward at a place of a cache, and a chunk made once more
            there counts on: ``handle.reset()`` before it, or its first step may use a list of the
            last one.
        layout: ``tiles`` or ``raster``: reorder the tokens of a frame around the sparse call, so
            that blocks are tiles or runs of rows. An experiment: it costs a copy of q, k and v.
        budget: blocks of each head, as a :class:`lightforcing.selectors.Budget`; the total stays.
        step_share: what share of the kept blocks each forward of a chunk gets: its denoising steps
            in order, then the pass that fills the cache. Only the ratios matter, the sum over the
            forwards stays; None is the same for all. Where the chunk before had another number of
            forwards all get the same, and the report says so; so they do in a CUDA graph, which
            may be replayed in any of them. A given chunk, which is cached without denoising,
            counts as a first step. Forwards of ``dense_steps`` take no part.
        dense_layers: layers that stay dense, counted from 0; negative from the end.
        dense_steps: denoising steps of a chunk that stay dense, counted from 0.
        strict: raise where a call would stay dense for a reason nobody asked for.
        timing: measure milliseconds of attention by layer and chunk (events on CUDA, the
            host's clock on the CPU).
        probe: query rows per sparse call whose recall is measured; 0 is off.

    Raises:
        ValueError: a value is out of range. TypeError: a value is of the wrong kind.
    """

    sparsity: float = 0.80
    base: float | None = None
    law: str = "count"
    schedule: tuple[float, ...] | None = None
    num_frames: int | None = None
    frames_per_chunk: int | None = None
    chunk_ends: tuple[int, ...] | None = None
    dense_frames: int | None = None
    window: int | None = None
    frame_tokens: int | None = None
    grid: tuple[int, int] | None = None
    token_order: str | None = None
    selector: Any = None
    score: str = "mass"
    hierarchy: bool = False
    keep_frames: int = 6
    sink_frames: int = 1
    near_frames: int = 2
    block_q: int = 128
    block_k: int = 64
    refresh: int = 1
    layout: str | None = None
    budget: Any = None
    step_share: tuple[float, ...] | None = None
    dense_layers: tuple[int, ...] = ()
    dense_steps: tuple[int, ...] = ()
    strict: bool = False
    timing: bool = False
    probe: int = 0

    def __post_init__(self):
        """Check every field, and make lists tuples."""

        def put(name, check, *limits):
            object.__setattr__(self, name, check(name, getattr(self, name), *limits))

        put("sparsity", _number, 0.0, 1.0, True)
        put("law", _choice, LAWS)
        put("base", _optional(_number), self.sparsity, 1.0)
        if self.base is not None and self.law in FLAT:
            raise ValueError(
                f"base: expected none with law {self.law}, which does not grow towards it (linear "
                f"and exponential do), got {self.base:g}"
            )
        put("schedule", _optional(_tuple_of(_number)), 0.0, 1.0, True)
        for name in ("num_frames", "frames_per_chunk", "window", "frame_tokens"):
            put(name, _optional(_integer), 1)
        put("dense_frames", _optional(_integer), 0)
        put("chunk_ends", _optional(_tuple_of(_integer)), 1)
        put("grid", _optional(_tuple_of(_integer)), 1)
        if self.grid is not None and len(self.grid) != 2:
            raise ValueError(f"grid: expected rows and columns, got {list(self.grid)}")
        if self.grid and self.frame_tokens not in (None, self.grid[0] * self.grid[1]):
            raise ValueError(
                f"grid: expected rows x columns = frame_tokens = {self.frame_tokens}, "
                f"got {list(self.grid)}"
            )
        put("token_order", _optional(_choice), ("raster", "morton"))
        put("layout", _optional(_choice), ("raster", "tiles"))
        put("score", _choice, SCORES)
        for name in ("hierarchy", "strict", "timing"):
            put(name, _boolean)
        put("keep_frames", _integer, 1)
        for name in ("sink_frames", "near_frames", "probe"):
            put(name, _integer, 0)
        put("block_q", _integer, 16, 128)
        put("block_k", _choice, (16, 32, 64, 128))
        put("refresh", _integer, 1)
        put("selector", _optional(_selector))
        put("budget", _optional(_budget))
        if isinstance(self.selector, str):
            for name, value in zip(("score", "hierarchy"), BUILT_IN[self.selector], strict=True):
                object.__setattr__(self, name, value)
            object.__setattr__(self, "selector", None)
        if self.budget is not None and self.selector is None and self.hierarchy:
            raise ValueError("budget: expected hierarchy=False or a selector beside it, got hsa")
        if isinstance(self.step_share, (set, frozenset)):
            raise TypeError(f"step_share: expected a list, in order, got {self.step_share!r}")
        put("step_share", _optional(_tuple_of(_number)), 0.0, 1e6)
        if self.step_share is not None and not sum(self.step_share):
            raise ValueError(
                f"step_share: expected numbers that are not all 0, got {list(self.step_share)}"
            )
        if self.step_share is not None and self.refresh > 1:
            raise ValueError(
                f"step_share: expected None beside refresh = {self.refresh}, whose steps share a "
                f"list, got {list(self.step_share)}"
            )
        put("dense_layers", _tuple_of(_integer), -math.inf)
        put("dense_steps", _tuple_of(_integer), 0)
        if self.sink_frames + self.near_frames > self.keep_frames:
            raise ValueError(
                f"keep_frames: expected at least sink_frames + near_frames = "
                f"{self.sink_frames + self.near_frames}, got {self.keep_frames}"
            )
        ends = self.chunk_ends
        if ends is not None and (not ends or list(ends) != sorted(set(ends))):
            raise ValueError(f"chunk_ends: expected ascending frame numbers, got {list(ends)}")
        if self.schedule is not None and not self.schedule:
            raise ValueError("schedule: expected at least one value, got none")
        if ends is not None and self.schedule is not None and len(ends) != len(self.schedule):
            raise ValueError(
                f"schedule: expected {len(ends)} values, one for each of chunk_ends, "
                f"got {len(self.schedule)}"
            )

    @property
    def plain(self):
        """Is the list select_blocks', new in every call, on tokens as they lie?"""
        extras = (self.selector, self.layout, self.budget)
        return self.refresh == 1 and all(x is None for x in extras)

    def selection(self):
        """The keywords of :func:`lightforcing.select_blocks` that these settings fix."""
        return {name: getattr(self, name) for name in SELECTION}

    @classmethod
    def preset(cls, name="balanced", *, sparsity=None, **overrides):
        """The preset ``name``, with one number or any fields of it replaced.

        ``sparsity=s`` alone means target s and base ``min(1, s + 0.10)``; the preset's other
        fields stay.

        Raises:
            ValueError: no preset of this name. TypeError: no field of this name.
        """
        if not isinstance(name, str) or name not in PRESETS:
            given = f"a {type(name).__name__}" if isinstance(name, (Config, dict)) else repr(name)
            raise ValueError(
                f"preset: expected one of {', '.join(PRESETS)}, got {given}{_meant(name)}"
            )
        return cls(**PRESETS[name]).replace(sparsity=sparsity, **overrides)

    def replace(self, *, sparsity=None, **overrides):
        """A copy with fields replaced.

        ``sparsity=s`` also sets base to ``min(1, s + 0.10)`` and drops a given schedule; a law
        without a base drops the base, and a ``refresh`` above 1 the shares of steps.

        Raises:
            TypeError: no field of this name, or score or hierarchy beside a selector.
        """
        _known(overrides)
        beside = sorted(overrides.keys() & {"score", "hierarchy"})
        if overrides.get("selector") is not None and beside:
            raise TypeError(
                f"selector: expected no {beside[0]} beside it, which it takes the place of, "
                f"got {overrides[beside[0]]!r}"
            )
        if sparsity is not None:
            overrides = {"sparsity": sparsity, "base": None, "schedule": None, **overrides}
        if overrides.get("law") in FLAT:
            overrides = {"base": None, **overrides}
        if overrides.get("refresh", 1) != 1:
            overrides = {"step_share": None, **overrides}
        return replace(self, **overrides)

    def to_dict(self):
        """Plain Python values, JSON-ready; :meth:`from_dict` takes them back."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.selector is not None:
            from .selectors import to_dict

            values["selector"] = to_dict(self.selector)
        if self.budget is not None:
            values["budget"] = [list(row) for row in self.budget.shares]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values):
        """The inverse of :meth:`to_dict`; missing fields take their defaults."""
        if not isinstance(values, dict):
            raise TypeError(f"values: expected a dict of settings, got {type(values).__name__}")
        _known(values)
        return cls(**values)

    def to_json(self):
        """One line of JSON."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text):
        """The inverse of :meth:`to_json`."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"text: expected JSON of a Config, got {text[:40]!r}: {error}"
            ) from None
        return cls.from_dict(values)


def _meant(name):
    """What somebody who wrote ``name`` for a preset will have meant, or nothing."""
    if isinstance(name, (int, float)) and not isinstance(name, bool):
        return f"; did you mean sparsity={name!r}?"
    if isinstance(name, (Config, dict)):
        return "; settings are given as config="
    if not isinstance(name, str):
        return ""
    close = difflib.get_close_matches(name.lower().replace("_", "-"), PRESETS, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _known(values):
    names = [f.name for f in fields(Config)]
    for name in values:
        if name not in names:
            raise TypeError(f"{name}: no such setting; the settings are {', '.join(names)}")


def _number(name, value, low, high, open_above=False):
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    number = float(value)
    if not low <= number <= high or (open_above and number == high):
        bracket = ")" if open_above else "]"
        raise ValueError(f"{name}: expected a number in [{low:g}, {high:g}{bracket}, got {value}")
    return number


def _integer(name, value, low, high=math.inf):
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if number < low:
        raise ValueError(f"{name}: expected an integer of at least {low}, got {number}")
    if number > high:
        raise ValueError(f"{name}: expected an integer of at most {high}, got {number}")
    return number


def _boolean(name, value):
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return value


def _choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, choices))}, got {value!r}")
    return value


def _selector(name, value):
    if isinstance(value, str) and value in BUILT_IN:
        return value
    from .selectors import make

    return make(value)


def _budget(name, value):
    from .selectors import Budget

    if isinstance(value, Budget):
        return value
    try:
        return Budget(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _optional(check):
    return lambda name, value, *limits: None if value is None else check(name, value, *limits)


def _tuple_of(check):
    def checked(name, value, *limits):
        if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
            raise TypeError(f"{name}: expected a list, got {value!r}")
        return tuple(check(name, item, *limits) for item in value)

    return checked
