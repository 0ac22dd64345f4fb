"""What the user reads: the plan before a run, the report and the statistics after it.

Nothing here needs a model, and :func:`plan` needs no torch. Chunks are numbered from 1.
"""

from __future__ import annotations

import html as escape
from dataclasses import dataclass, field

from . import ops
from .config import Config
from .schedule import Schedule
from .stats import total

FRAMES_PER_CHUNK, FRAME_TOKENS = 3, 1560  # of Wan 1.3B at 480 x 832, until a call tells
ROWS = 40  # chunks shown in a text report
_FIRST_CHUNK, _DENSE_STEP = "first chunk", "dense step"  # of reasons.py, which needs torch


def schedule(config: Config, frames_per_chunk: int, window: int | None) -> Schedule:
    """The schedule that ``config`` gives a model with these facts."""
    common = {
        "chunk_ends": config.chunk_ends,
        "dense_frames": config.dense_frames,
        "window": config.window or window,
    }
    if config.schedule is not None:
        return Schedule.given(config.schedule, frames_per_chunk, **common)
    return Schedule.solve(
        config.num_frames,
        frames_per_chunk,
        sparsity=config.sparsity,
        base=config.base,
        law=config.law,
        **common,
    )


# ---- the plan ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A schedule chunk by chunk, and the gain it predicts; ``str()`` is a text table.

    Attributes:
        rows: a dict a chunk: chunk, first_frame, last_frame, resident_frames, sparsity, blocks,
            kept, density. Chunk 1 is the first; a dense chunk keeps all blocks.
        attention_gain: resident over kept query-key blocks, all chunks together, in layers and
            steps that are not dense by ``dense_layers`` or ``dense_steps``.
        step_gain: the same for whole steps by Amdahl's law; None without a share.
        attention_share: share of a dense step that is self-attention, or None.
        assumed: facts that no call has told yet.
    """

    config: Config
    rows: list[dict]
    attention_gain: float
    step_gain: float | None
    attention_share: float | None
    frame_tokens: int
    frames_per_chunk: int
    assumed: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict:
        """Plain values, JSON-ready."""
        names = ("rows", "attention_gain", "step_gain", "attention_share", "frame_tokens",
                 "frames_per_chunk")  # fmt: skip
        return {n: getattr(self, n) for n in names} | {"assumed": list(self.assumed)}

    def __str__(self) -> str:
        """The table."""
        rows = [
            {
                "chunk": r["chunk"],
                "frames": f"{r['first_frame']}-{r['last_frame']}",
                "resident": r["resident_frames"],
                "sparsity": f"{r['sparsity']:.3f}" if r["kept"] < r["blocks"] else "dense",
                "kept blocks": f"{r['kept']} of {r['blocks']}",
                "gain": f"{r['blocks'] / r['kept']:.1f}x",
            }
            for r in self.rows
        ]
        lines = [_settings(self.config), *_table(rows)]
        lines.append(f"attention: {self.attention_gain:.2f}x fewer query-key pairs than dense")
        if self.config.dense_layers or self.config.dense_steps:
            lines.append("in the layers and steps that dense_layers and dense_steps leave sparse")
        if self.step_gain is not None:
            lines.append(
                f"whole step: {self.step_gain:.2f}x at most, with attention at "
                f"{self.attention_share:.0%} of a dense step"
            )
        if self.assumed:
            lines.append("assumed, until a call tells: " + ", ".join(self.assumed))
        return "\n".join(lines)


def plan(
    config: Config,
    *,
    num_frames: int | None = None,
    frames_per_chunk: int = FRAMES_PER_CHUNK,
    frame_tokens: int = FRAME_TOKENS,
    window: int | None = None,
    attention_share: float | None = None,
    assumed: tuple[str, ...] = (),
) -> Plan:
    """What ``config`` means for a video, before any call.

    Args:
        config: the settings.
        num_frames: latent frames; None takes the settings', else 21, or 63 with a window.
        frames_per_chunk: latent frames of a chunk.
        frame_tokens: tokens of a frame.
        window: the model's, where the settings name none.
        attention_share: share of a dense step that is self-attention, in [0, 1].
        assumed: facts to name as assumed in the text.

    Raises:
        ValueError: a number is out of range.
    """
    if attention_share is not None and not 0 <= attention_share <= 1:
        raise ValueError(f"attention_share: expected a number in [0, 1], got {attention_share}")
    if num_frames is not None:
        config = config.replace(num_frames=num_frames)
    solved = schedule(config, frames_per_chunk, window)
    rows, first = [], 0
    for chunk, end in enumerate(map(int, solved.chunk_ends), 1):
        sparsity = solved.at(first + frames_per_chunk) if first else 0.0
        resident = min(end, solved.window or end)
        blocks, kept, _ = ops.plan_selection(
            min(end - first, resident),
            resident,
            frame_tokens,
            sparsity=sparsity,
            block_k=config.block_k,
            keep_frames=config.keep_frames,
            hierarchy=config.hierarchy and config.selector is None,
        )
        rows.append(
            {
                "chunk": chunk,
                "first_frame": first,
                "last_frame": end - 1,
                "resident_frames": resident,
                "sparsity": sparsity,
                "blocks": blocks,
                "kept": kept,
                "density": kept / blocks,
            }
        )
        first = end
    weights = [r["last_frame"] + 1 - r["first_frame"] for r in rows]
    blocks = sum(w * r["blocks"] for w, r in zip(weights, rows, strict=True))
    gain = blocks / sum(w * r["kept"] for w, r in zip(weights, rows, strict=True))
    share = attention_share
    step = None if share is None else 1 / (1 - share + share / gain)
    return Plan(config, rows, gain, step, share, frame_tokens, frames_per_chunk, assumed)


def explain(handle, **facts) -> Plan:
    """The plan with what the handle's calls have told; see :meth:`Handle.explain`."""
    told = handle.facts
    facts.setdefault("window", told.get("window"))
    assumed = []
    if "frames_per_chunk" not in facts:
        facts["frames_per_chunk"] = handle.chunk_frames
        config = handle.config
        if not (config.frames_per_chunk or handle.frames_per_chunk or handle.shortest_query):
            assumed.append(f"{handle.chunk_frames} frames a chunk")
    if "frame_tokens" not in facts:
        tokens = told.get("frame_tokens") or handle.config.frame_tokens
        if tokens is None:
            assumed.append(f"{FRAME_TOKENS} tokens a frame")
        facts["frame_tokens"] = tokens or FRAME_TOKENS
    if "window" not in told and handle.config.window is None and facts["window"] is None:
        assumed.append("no window")
    facts.setdefault("attention_share", handle.record.dense_attention_share)
    return plan(handle.config, assumed=tuple(assumed), **facts)


# ---- after a run ---------------------------------------------------------------------------


def stats(handle) -> dict:
    """See :meth:`Handle.stats`."""
    record, timing = handle.record, handle.config.timing
    record.settle()
    cells = record.snapshot()
    values = total(cells.values()).to_dict(timing)
    values["attention_share"] = record.attention_share
    values["means_bytes"] = handle.means_bytes
    chunks, layers = {}, {}
    for (layer, chunk), cell in cells.items():
        chunks.setdefault(chunk, []).append(cell)
        layers.setdefault(layer, []).append({"chunk": chunk, **cell.to_dict(timing)})
    values["chunks"] = [{"chunk": c, **total(x).to_dict(timing)} for c, x in chunks.items()]
    values["layers"] = [{"layer": i, "chunks": layers[i]} for i in sorted(layers)]
    return values


def text(handle) -> str:
    """See :meth:`Handle.report`."""
    values = stats(handle)
    table = _table(_rows(handle, values))
    return "\n".join([*_head(handle, values), *table, *_tail(handle, values)])


def html(handle) -> str:
    """The report as a table for notebooks."""
    values = stats(handle)
    rows = _rows(handle, values)
    lines = [f"<p>{escape.escape(line)}</p>" for line in _head(handle, values)]
    if rows:
        head = "".join(f"<th>{escape.escape(name)}</th>" for name in rows[0])
        body = "".join(
            "<tr>" + "".join(f"<td>{escape.escape(str(x))}</td>" for x in row.values()) + "</tr>"
            for row in rows
        )
        lines.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
    lines.append(f"<pre>{escape.escape(chr(10).join(_tail(handle, values)))}</pre>")
    return "".join(lines)


def _head(handle, values):
    layers = len(handle.hooks)
    kind = handle.facts.get("layer", "attention")
    what = f"{layers} layers of {kind}" if layers else f"unpatched ({kind})"
    lines = [f"lightforcing: {what}; {_settings(handle.config)}"]
    by_wish, steps = list(handle.config.dense_layers), list(handle.config.dense_steps)
    if by_wish or steps:
        missed = steps and values["sparse_calls"] and _DENSE_STEP not in values["dense"]
        lines.append(
            f"dense by wish: layers {by_wish}, steps {steps}"
            + (" that no call had" if missed else "")
        )
    chunks = [c["chunk"] for c in values["chunks"] if c["chunk"] is not None]
    return [*lines, _geometry(handle, max(chunks))] if chunks else lines


def _geometry(handle, last):
    """The sizes that the calls were counted with, so that a wrong setting is seen."""
    config, told = handle.config, handle.facts
    tokens = told.get("frame_tokens") or config.frame_tokens or "an unknown number of"
    size, window = handle.chunk_frames, config.window or told.get("window")
    ends = handle.schedule(size, window).chunk_ends
    parts = [f"{tokens} tokens a frame", f"{size} frame{'s' if size > 1 else ''} a chunk"]
    if window:
        parts.append(f"a window of {window} frames")
    had = f", this run had {last}" if last != len(ends) else ""
    return ", ".join([*parts, f"planned for {ends[-1]} frames ({len(ends)} chunks{had})"])


def _settings(config):
    if config.schedule is not None:
        law = "a given schedule"
    else:
        base = f" (base {config.base})" if config.base is not None else ""
        law = f"sparsity {config.sparsity:g}{base} by law {config.law}"
    extras = [f"a list for {config.refresh} steps"] if config.refresh > 1 else []
    if config.step_share is not None:
        extras.append("blocks by step " + " ".join(f"{x:g}" for x in config.step_share))
    extras += ["a budget by head"] if config.budget is not None else []
    extras += [f"tokens as {config.layout}"] if config.layout is not None else []
    if config.selector is not None:
        return ", ".join([law, f"selector {config.selector.name}", *extras])
    frames = f"{config.keep_frames}/{config.sink_frames}/{config.near_frames}"
    stage = f"frames {frames} first" if config.hierarchy else "no frame stage"
    return ", ".join([law, f"{config.score} scores", stage, *extras])


def _rows(handle, values):
    config, rows = handle.config, []
    for c in values["chunks"]:
        row = {
            "chunk": "-" if c["chunk"] is None else c["chunk"],
            "calls": c["calls"],
            "sparse": c["sparse_calls"],
            "sparsity": "-" if c["sparsity"] is None else f"{c['sparsity']:.3f}",
            "density": "-" if c["density"] is None else f"{c['density']:.1%}",
        }
        if config.probe:
            row["recall"] = "-" if c["recall"] is None else f"{c['recall']:.1%}"
            row["p5"] = "-" if c["recall_p5"] is None else f"{c['recall_p5']:.1%}"
        if config.timing:
            row["ms a call"] = f"{c['ms'] / c['calls']:.3f}" if c["calls"] else "-"
        rows.append(row)
    hidden = len(rows) - ROWS
    if hidden > 0:
        rows[ROWS // 2 : -ROWS // 2] = [dict.fromkeys(rows[0], "...")]
    return rows


def _tail(handle, values):
    lines = [] if values["chunks"] else ["no calls yet"]
    if values["dense"]:
        lines.append("dense, through the original function:")
        lines += [f"  {n:>6}  {reason}" for reason, n in sorted(values["dense"].items())]
    raised = {c["chunk"]: c["keep_frames"] for c in values["chunks"] if "keep_frames" in c}
    for chunk, frames in raised.items():
        lines.append(f"keep_frames rose to {frames} in chunk {chunk}: the budget holds more blocks")
    for forwards, chunks in sorted(handle.misfits.items()):
        lines.append(
            f"step_share is for {len(handle.config.step_share)} forwards a chunk, {chunks} had "
            f"{forwards}: the chunk after keeps the same in all"
        )
    if handle.captured_even:
        lines.append("step_share does not apply in a CUDA graph: all its forwards keep the same")
    if values["calls"] and not values["sparse_calls"]:
        lines.append(f"none of the {values['calls']} calls was sparse{_why_none(handle, values)}")
    elif values["density"]:
        calls = f"{values['sparse_calls']} of {values['calls']} calls sparse"
        lines.append(
            f"attention: {1 / values['density']:.2f}x fewer query-key pairs than dense ({calls})"
        )
    if values["attention_share"] is not None:
        lines.append(f"attention took {values['attention_share']:.0%} of a step, as it ran")
    return lines


def _why_none(handle, values):
    """Why all calls were dense, and the setting to look at where the reason names none."""
    why, size, query = set(values["dense"]), handle.chunk_frames, handle.shortest_query
    if why != {_FIRST_CHUNK}:
        return f" ({' and '.join(sorted(why))})"
    text = f": all lie in the first chunk, {size} frames"
    if handle.config.frames_per_chunk and query and query < size:
        text += f" as frames_per_chunk says, though a query has only {query}"
    return text


def _table(rows):
    """Lines of a table of dicts, numbers to the right."""
    if not rows:
        return []
    cells = [list(rows[0]), *([str(x) for x in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(x.rjust(w) for x, w in zip(row, widths, strict=True)) for row in cells]
