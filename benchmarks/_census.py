"""Count a rollout's attention calls from outside the library, and say which should be sparse.

The census sits below the patch: it takes the place of the checkout's own `attention` before the
patch does, so it sees exactly the calls that reach the original, and a pre-hook on every layer
sees all forwards. A forward without a call to the original was sparse. `expected` is the method's
rule written a second time, from the settings and the schedule alone.
"""

from __future__ import annotations

import inspect
import math
import time
from dataclasses import dataclass

import torch


@dataclass
class Call:
    """One forward of one self-attention layer with a cache."""

    layer: int
    first: int  # first query frame, counted over the video
    query: int  # query frames
    keys: int | None = None  # key frames; None if the original was not called
    dense: bool = False
    rows: int = 0  # heads x query tokens, the weight of the call in a density


def self_attentions(model):
    """Return the causal self-attention modules of a model, in order, found by what they have."""
    wanted = ("q", "k", "v", "o", "num_heads")
    return [
        m
        for m in model.modules()
        if all(hasattr(m, name) for name in wanted)
        and "kv_cache" in inspect.signature(type(m).forward).parameters
    ]


def namespaces(layers):
    """Return the globals dicts in which the layers' forwards look `attention` up, each once."""
    return list({id(g): g for g in (type(m).forward.__globals__ for m in layers)}.values())


class Census:
    """Records all attention calls of a model inside a `with` block."""

    def __init__(self, model):
        self.layers = self_attentions(model)
        self.calls: list[Call] = []
        self.ticks: list[tuple[tuple, float]] = []  # (first, query), CPU time
        self._now = None

    def __enter__(self):
        """Put recorders in place."""
        self._handles = [
            m.register_forward_pre_hook(self._entering(i, m), with_kwargs=True)
            for i, m in enumerate(self.layers)
        ]
        self._originals = [(g, g["attention"]) for g in namespaces(self.layers)]
        for space, original in self._originals:
            space["attention"] = self._recorder(original)
        return self

    def __exit__(self, *exc):
        """Take them out again."""
        for handle in self._handles:
            handle.remove()
        for space, original in self._originals:
            space["attention"] = original
        self.ticks.append(((), time.process_time()))

    def _entering(self, index, module):
        signature = inspect.signature(type(module).forward)

        def hook(module, args, kwargs):
            given = signature.bind(module, *args, **kwargs).arguments
            height, width = given["grid_sizes"][0].tolist()[1:]
            tokens = height * width
            first = given.get("current_start", 0) // tokens
            query = given["x"].shape[1] // tokens
            rows = module.num_heads * given["x"].shape[0] * given["x"].shape[1]
            self._now = Call(index, int(first), query, rows=rows)
            self._tokens = tokens
            self.calls.append(self._now)
            if index == 0:
                self.ticks.append(((int(first), query), time.process_time()))

        return hook

    def _recorder(self, original):
        def attention(q, k, v, *args, **kwargs):
            if self._now is not None:
                self._now.dense, self._now.keys = True, k.shape[1] / self._tokens
                if self._now.keys == int(self._now.keys):
                    self._now.keys = int(self._now.keys)
            return original(q, k, v, *args, **kwargs)

        return attention

    def seconds(self):
        """Return CPU seconds by (first, query) frames, all between attention calls included."""
        sums: dict[tuple, float] = {}
        for (place, begin), (_, end) in zip(self.ticks, self.ticks[1:], strict=False):
            sums[place] = sums.get(place, 0.0) + end - begin
        return sums


def expected(call: Call, config, schedule, chunk, frame_tokens):
    """Return the share of blocks that the rule keeps for a call; 1.0 means dense.

    Args:
        call: from a dense census, so that its key frames are known.
        config: the settings, a `lightforcing.Config`.
        schedule: the `lightforcing.Schedule` of these settings.
        chunk: frames of a chunk.
        frame_tokens: tokens of a frame.
    """
    past = call.keys - call.query
    if past <= 0 or call.first < chunk:
        return 1.0
    sparsity = schedule.at(call.first + chunk)
    blocks = call.keys * math.ceil(frame_tokens / config.block_k)
    kept = max(1, math.floor((1 - sparsity) * blocks + 1e-9))
    return min(1.0, kept / blocks) if sparsity > 0 else 1.0


def solve(lightforcing, config, chunk, window):
    """Return the schedule of these settings, without the patch's help."""
    return lightforcing.Schedule.solve(
        config.num_frames or (63 if window or config.window else 21),
        chunk,
        sparsity=config.sparsity,
        base=config.base,
        window=config.window or window,
        law=config.law,
    )


def table(calls, chunk):
    """Group calls by place: a list of dicts with chunk (from 1), first, query, keys, calls."""
    groups: dict[tuple, dict] = {}
    for call in calls:
        key = (math.ceil(call.first / chunk) + 1, call.first, call.query, call.keys)
        row = groups.setdefault(
            key, dict(zip(("chunk", "first", "query", "keys"), key, strict=True), calls=0)
        )
        row["calls"] += 1
    return [groups[key] for key in sorted(groups, key=lambda k: (k[1], k[2], k[3]))]


def distance(a, b):
    """Return the relative L2 distance of two latents, and the largest absolute difference."""
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm()).item(), (a - b).abs().max().item()


def finite(x):
    """Say whether every value is a number."""
    return bool(torch.isfinite(x).all())
