"""Figures drawn with matplotlib, which the ``viz`` extra brings."""

from __future__ import annotations

from pathlib import Path

# Okabe and Ito's palette: told apart with any colour vision.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"


def figure(columns: int, width: float = 10.0, height: float = 3.4):
    """Axes in a row, without a display and without touching pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    page = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(page)
    axes = page.subplots(1, columns)
    for axis in axes if columns > 1 else [axes]:
        axis.spines[["top", "right"]].set_visible(False)
    return page, axes


def schedule(plan, path: str) -> None:
    """Sparsity of every chunk, and the key blocks that a query keeps beside all there are.

    Args:
        plan: a :class:`lightforcing.report.Plan`.
        path: file to write; its suffix decides the format.

    Raises:
        ValueError: matplotlib does not know the suffix.
    """
    rows = plan.rows
    chunks = [r["chunk"] for r in rows]
    page, (left, right) = figure(2)
    left.plot(chunks, [r["sparsity"] for r in rows], "o-", color=BLUE)
    left.set(xlabel="chunk", ylabel="sparsity (share not attended)", ylim=(-0.03, 1.03))
    right.bar(chunks, [r["blocks"] for r in rows], color="#dddddd", label="resident")
    right.bar(chunks, [r["kept"] for r in rows], color=ORANGE, label="kept")
    right.set(xlabel="chunk", ylabel="key blocks of a query block")
    right.legend(frameon=False)
    page.suptitle(str(plan).splitlines()[0], fontsize=11)
    if Path(path).suffix.lstrip(".").lower() not in page.canvas.get_supported_filetypes():
        known = ", ".join(sorted(page.canvas.get_supported_filetypes()))
        raise ValueError(f"--plot: expected a file ending in one of {known}, got {path}")
    page.savefig(path, dpi=150)
