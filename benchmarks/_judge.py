"""Selectors judged on the queries and keys of real calls: recall, output error, density."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from lightforcing import selectors
from lightforcing.blocks import frame_blocks
from lightforcing.selectors.metrics import measure

FIGURES = ("recall", "recall_p5", "oracle_ratio", "rel_l2", "density")


def judge(call, names, *, kept=None, sparsity=None, block_q=128, block_k=64, notes=None):
    """Every selector on one captured call, with the same budget.

    Args:
        call: a ``lightforcing.capturing.Captured``.
        names: selectors; one that cannot work on this call is left out, ``notes`` says why.
        kept: key blocks a row of queries; or the share that is not kept:
        sparsity: in [0, 1).
        block_q: query rows that share a list.
        block_k: tokens of a key block.
        notes: a dict that gets {name: reason}.

    Returns:
        {name: dict of ``lightforcing.selectors.metrics.measure``}.
    """
    facts = call.facts
    if kept is None:
        blocks = call.k.shape[1] // facts.frame_tokens * frame_blocks(facts.frame_tokens, block_k)
        kept = max(1, int((1 - sparsity) * blocks + 1e-9))
    place = dict(
        frame_tokens=facts.frame_tokens, kept=kept, grid=facts.grid, order=facts.order,
        block_q=block_q, block_k=block_k, first_frame=facts.first_frame, chunk=facts.chunk,
        layer=facts.layer, step=facts.step, scale=facts.scale,
    )  # fmt: skip
    lists = {}
    for name in dict.fromkeys(["oracle", *names]):
        try:
            lists[name] = selectors.select(name, call.q, call.k, **place)
        except (ValueError, TypeError, NotImplementedError) as error:
            if notes is None or name == "oracle":
                raise
            notes.setdefault(name, str(error))
    found = measure(call.q, call.k, call.v, lists, scale=facts.scale, oracle=lists["oracle"])
    return {name: found[name] for name in names if name in found}


class Tally:
    """Figures of many calls, by selector, and by layer, chunk and step of the call."""

    def __init__(self):
        self.cells, self.notes = [], {}

    def add(self, facts, figures):
        """What :func:`judge` said of a call."""
        for name, values in figures.items():
            place = {"layer": facts.layer, "chunk": facts.chunk, "step": facts.step}
            self.cells.append({"selector": name, **place, **values})

    def means(self, by=()):
        """Mean figures, a dict a selector and a value of each of ``by``; recall_p5 is a mean too.

        Args:
            by: of ``layer``, ``chunk``, ``step``.
        """
        groups = defaultdict(list)
        for cell in self.cells:
            groups[(cell["selector"], *(cell[b] for b in by))].append(cell)
        rows = []
        for key, cells in groups.items():
            row = dict(zip(("selector", *by), key, strict=True), calls=len(cells))
            for figure in FIGURES:
                values = [c[figure] for c in cells if c.get(figure) is not None]
                row[figure] = float(np.mean(values)) if values else None
            rows.append(row)
        return rows

    def heads(self, selector):
        """Mean recall of every layer and head, ``[layers, heads]``, layers in ascending order."""
        found = defaultdict(list)
        for cell in self.cells:
            if cell["selector"] == selector:
                found[cell["layer"]].append(cell["recall_heads"])
        return np.array([np.mean(found[layer], axis=0) for layer in sorted(found)])


def text(rows, by=()):
    """Lines of a table, the best recall first within each group of ``by``."""
    head = f"{'selector':14}" + "".join(f"{b:>7}" for b in by)
    head += f"{'calls':>7}{'recall':>8}{'5 %':>7}{'/oracle':>9}{'rel L2':>8}{'density':>9}"
    lines = [head]
    rows = sorted(rows, key=lambda r: (*(r[b] for b in by), -(r["recall"] or 0)))
    for row in rows:
        line = f"{row['selector']:14}" + "".join(f"{row[b]:>7}" for b in by)
        figures = [row[f] for f in FIGURES]
        cells = ["-" if x is None else f"{x:.3f}" for x in figures]
        line += f"{row['calls']:>7}"
        widths = (8, 7, 9, 8, 9)
        lines.append(line + "".join(c.rjust(w) for c, w in zip(cells, widths, strict=True)))
    return lines
