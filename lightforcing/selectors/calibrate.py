"""A budget by head from calls of the dense model: where another block lowers the error most."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from .. import ops, report
from ..config import Config
from .budget import Budget
from .choose import geometry_of, layout, needs_grid, selector_of
from .metrics import measure

MULTIPLES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
UNIT = 8  # a head's share of 1 in the integers of Budget.from_errors


def calibrate(
    calls: Iterable[Any], config: Config, multiples: Sequence[float] = MULTIPLES
) -> Budget:
    """The budget at which the attention outputs of ``calls`` are least off, at the same total.

    The error of a head at so many blocks is the squared difference of its output to the dense one,
    as a share of the squared norm of its layer's output, over all calls of the layer. Greedy on
    attention *mass* is a trap: it starves heads whose attention is flat.

    Args:
        calls: with ``q``, ``k``, ``v`` and ``facts`` each, as :func:`lightforcing.capture` gives
            them; of every layer at least one. Calls that the settings leave dense are passed over.
        config: schedule, selector and block sizes.
        multiples: of the schedule's count that a head may get, ascending.

    Raises:
        ValueError: no call was sparse, or a layer had none.
    """
    selector = selector_of(config)
    errors = {}
    for call in calls:
        geometry = _geometry(call, config)
        if geometry is None:
            continue
        (q, k, v), _ = layout(config, SimpleNamespace(call=call.facts), call.q, call.k, call.v)
        lists = {}
        for m in multiples:
            kept = min(geometry.blocks, max(1, round(m * geometry.kept)))
            lists[m] = selector.select(q, k, replace(geometry, kept=kept))
        found = measure(q, k, v, lists, scale=call.facts.scale)
        table = np.array([found[m]["error_heads"] for m in multiples]).T  # [heads, n]
        errors.setdefault(call.facts.layer, []).append(table)
    if not errors or sorted(errors) != list(range(max(errors) + 1)):
        raise ValueError(
            f"calls: expected sparse calls of every layer from 0, got layers {sorted(errors)}"
        )
    means = [np.mean(errors[layer], axis=0) for layer in sorted(errors)]
    counts = [max(1, round(m * UNIT)) for m in multiples]
    return Budget.from_errors(np.stack(means), counts, UNIT)


def _geometry(call, config):
    """The call with its schedule's count, or None where it is dense."""
    facts = call.facts
    tokens, size = facts.frame_tokens, config.frames_per_chunk or facts.frames_per_chunk
    frames = call.q.shape[1] // tokens, call.k.shape[1] // tokens
    schedule = report.schedule(config, size, config.window or facts.window)
    sparsity = float(schedule.at(facts.first_frame + size))
    blocks, kept, _ = ops.plan_selection(
        *frames, tokens, sparsity=sparsity, block_k=config.block_k, hierarchy=False
    )
    if kept >= blocks or frames[0] == frames[1]:
        return None
    if needs_grid(config) and (config.grid or facts.grid) is None:
        return None
    return geometry_of(
        config,
        frame_tokens=tokens,
        q_frames=frames[0],
        k_frames=frames[1],
        kept=kept,
        grid=facts.grid,
        order=facts.order,
        first_frame=facts.first_frame,
        sink_frames=facts.sink_frames,
        chunk=facts.chunk,
        layer=facts.layer,
        step=facts.step,
        scale=facts.scale,
    )
