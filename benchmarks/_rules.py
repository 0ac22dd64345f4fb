"""The rows of the quality table: which blocks, how many in every chunk, and why the row is there.

Every row of a table keeps the same number of key blocks, summed over the chunks after the first:
what the linear law (the paper's) comes to at the target after rounding. The other laws share that
total out otherwise, by largest remainders.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np

import lightforcing as lf
from lightforcing.blocks import frame_blocks

FRAMES, CHUNK = 21, 3
CHUNKS = FRAMES // CHUNK
TARGET, BASE = 0.88, 0.98  # of the paper's 5 s schedule
CALIBRATED = "calibrated"
LAWS = ("cag", "uniform", "count", "reversed")


def resident(frame_tokens, block_k):
    """Key blocks that chunks 2, 3 ... see."""
    per_frame = frame_blocks(frame_tokens, block_k)
    return [CHUNK * (c + 1) * per_frame for c in range(1, CHUNKS)]


def shared_out(ideal, total):
    """Whole numbers near ``ideal`` whose sum is ``total``: largest remainders, ties to the first.

    No chunk keeps nothing.
    """
    kept = [max(1, int(x + 1e-9)) for x in ideal]
    order = sorted(range(len(kept)), key=lambda i: (kept[i] - ideal[i], i))
    missing = total - sum(kept)
    if not 0 <= missing <= len(kept):
        raise ValueError(f"total: expected {sum(kept)} to {sum(kept) + len(kept)}, got {total}")
    for i in order[:missing]:
        kept[i] += 1
    return tuple(kept)


@cache
def counts(law, blocks, target=TARGET, base=BASE):
    """Blocks kept in chunks 2, 3 ... by ``cag`` (linear), ``uniform``, ``count`` or ``reversed``.

    Args:
        law: ``uniform`` keeps the same share everywhere, ``count`` the same number; ``reversed``
            gives early chunks the shares that ``cag`` gives late ones.
        blocks: resident blocks of these chunks, a tuple.
        target: sparsity, mean over chunks weighted by their blocks.
        base: of the linear law.

    Returns:
        A tuple; its sum is the same for every law.
    """
    solved = lf.cag_schedule(FRAMES, CHUNK, sparsity=target, base=base)[1:]
    cag = [max(1, int((1 - s) * n + 1e-9)) for s, n in zip(solved, blocks, strict=True)]
    total = sum(cag)
    if law == "cag":
        return tuple(cag)
    if law == "uniform":
        ideal = [total * n / sum(blocks) for n in blocks]
    elif law == "count":
        ideal = [total / len(blocks)] * len(blocks)
    elif law == "reversed":
        share = [k / n for k, n in zip(reversed(cag), reversed(blocks), strict=True)]
        ideal = [s * n for s, n in zip(share, blocks, strict=True)]
        ideal = [x * total / sum(ideal) for x in ideal]
    else:
        raise ValueError(f"law: expected one of {', '.join(LAWS)}, got {law!r}")
    return shared_out(ideal, total)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: unique in its table.
        group: ``main``, ``presets``, ``laws``, ``pareto``, ``chunks`` (H1), ``frames`` (H4),
            ``steps`` or ``extras``.
        selector: a name that ``lightforcing.patch`` knows; None leaves every call dense.
        kept: blocks a row of queries keeps in chunks 2, 3 ...; 0 leaves a chunk dense.
        settings: further fields of ``lightforcing.Config``; they win over ``selector``. A budget
            of :data:`CALIBRATED` stands for one that is measured first.
        clips: share of the clips that are run; side questions and costly rows take fewer.
        preset: a preset, in place of selector, kept and block sizes; as it is shipped but for
            ``settings``, and at 64 px for the table's blocks.
    """

    name: str
    group: str = "main"
    selector: str | None = None
    kept: tuple[int, ...] = ()
    settings: dict = field(default_factory=dict)
    clips: float = 1.0
    preset: str | None = None

    def config(self, table, budget=None):
        """The settings of the patch, or None for a dense row; ``budget`` is the measured one."""
        if self.preset is not None:
            return shipped(self.preset, table).replace(**self.settings)
        if self.selector is None:
            return None
        blocks = resident(table.frame_tokens, table.block_k)
        shares = [1 - k / n if k else 0.0 for k, n in zip(self.kept, blocks, strict=True)]
        fields = {"selector": self.selector, "block_q": table.block_q, **self.settings}
        if fields.get("budget") == CALIBRATED:
            fields["budget"] = budget
        return lf.Config(
            schedule=[0.0, *shares], block_k=table.block_k, frames_per_chunk=CHUNK, **fields
        )


def shipped(preset, table):
    """The settings of a preset, for a video as long as the table's."""
    config = lf.Config.preset(preset, num_frames=FRAMES, frames_per_chunk=CHUNK)
    if table.block_k != config.block_k:
        config = config.replace(block_q=table.block_q, block_k=table.block_k)
    return config


def preset_row(preset, table, note="", **settings):
    """The row of a preset, with the blocks that its schedule comes to; ``settings`` change it."""
    config = shipped(preset, table).replace(**settings)
    solved = lf.cag_schedule(
        FRAMES, CHUNK, sparsity=config.sparsity, base=config.base, law=config.law
    )
    kept = [max(1, int((1 - s) * n + 1e-9)) for s, n in zip(solved[1:], table.blocks, strict=True)]
    name = "mass" if config.selector is None else config.selector.name
    name = "hsa" if config.selector is None and config.hierarchy else name
    return Row(f"preset {preset}{note}", "presets", name, tuple(kept), settings, preset=preset)


@dataclass(frozen=True)
class Table:
    """A resolution of the world model with the blocks it is cut into.

    Attributes:
        view: pixels of a side.
        block_k: tokens of a key block.
        block_q: query rows that share a list, where a row does not say otherwise.
        batch: clips rolled out at once on a GPU: more are no faster.
    """

    view: int
    block_k: int
    block_q: int
    batch: int

    @property
    def frame_tokens(self):
        """Tokens of a frame; a token is 4 x 4 pixels."""
        return (self.view // 4) ** 2

    @property
    def blocks(self):
        """Resident blocks of chunks 2, 3 ..."""
        return tuple(resident(self.frame_tokens, self.block_k))

    def counts(self, law, keep=1 - TARGET):
        """Kept blocks by law; ``keep`` is the mean share."""
        # The paper's base leaves a sixth of the kept share to the end of an endless video.
        base = BASE if keep == 1 - TARGET else 1 - keep / 6
        return counts(law, self.blocks, 1 - keep if keep != 1 - TARGET else TARGET, base)


TABLES = {64: Table(64, 16, 16, 64), 128: Table(128, 64, 64, 16)}

# Most wanted first: a run that is cut short has the rows that matter.
KEY = (("mean", "uniform"), ("mean", "cag"), ("mean", "count"), ("hsa", "cag"), ("mass", "cag"),
       ("mass", "count"))  # fmt: skip
RIVALS = ("lse", "sta", "random", "radial", "vmoba", "sparge-topp", "sparge-sim", "vsa", "sparge",
          "vsa-cube")  # fmt: skip
LAWS_OF = (
    ("mass", "uniform"),
    ("hsa", "uniform"),
    ("hsa", "count"),
    ("mean", "reversed"),
    ("lse", "count"),
)
STEPS = lf.Config.preset("fast").step_share
OTHER_STEPS = ((0.6, 0.6, 0.8, 2, 1), (0.1, 0.4, 0.7, 3.1, 0.7), (0.1, 0.2, 0.4, 3.6, 0.7))
KEY_NAMES = ("dense", *(f"{s} {law}" for s, law in KEY), "mass count steps")
SIDE, FEW = 0.5, 0.25  # share of the clips for side questions, and for what needs no more
# Seconds a batch to choose blocks on a GPU.
COSTLY = {"oracle": 0.25, "mass-fine": 0.5}


def steps_note(shares):
    """How a row's name says that the forwards of a chunk have other shares than the presets'."""
    return " steps " + " ".join(f"{x:g}" for x in shares)


def key_rows(table):
    """Dense and the rows that are run for every training seed."""
    made = [Row("dense")]
    return made + [Row(f"{s} {law}", "main", s, table.counts(law)) for s, law in KEY]


def rows(table, selectors):
    """All rows of a table in the order in which they should be run.

    Args:
        table: a :class:`Table`.
        selectors: names that this build knows; rows of others are left out.
    """
    made = [r for r in key_rows(table) if r.selector is None or r.selector in selectors]
    large = table.view == 128
    few = FEW if large else SIDE

    def add(group, selector, law, note="", keep=1 - TARGET, kept=None, share=SIDE, /, **settings):
        if selector in selectors:
            share = min(share, COSTLY.get(selector, 1.0))
            kept = table.counts(law, keep) if kept is None else kept
            made.append(Row(f"{selector} {law}{note}", group, selector, kept, settings, share))

    made += [preset_row(p, table) for p in ("paper", "fast", "balanced", "quality")]
    add("main", "mass", "count", " steps", 1 - TARGET, None, 1.0, step_share=STEPS)
    even = [preset_row(p, table, " even", step_share=None) for p in ("fast", "balanced", "quality")]
    made += [replace(row, clips=SIDE) for row in even]
    for shares in OTHER_STEPS:  # what lies next to the shares of the presets
        add("steps", "mass", "count", steps_note(shares), step_share=shares)
    if large:  # at 128 rows a query block, as shipped: what do half of them, and the law, bring?
        made.append(preset_row("quality", table, " q64", block_q=64))
        made.append(preset_row("fast", table, " q64", block_q=64))
        made.append(preset_row("quality", table, " linear", law="linear"))
        for selector, law in (("mass", "count"), ("mean", "cag"), ("hsa", "cag")):
            add("main", selector, law, " q128", 1 - TARGET, None, 1.0, block_q=128)
        settings = dict(block_q=128, step_share=STEPS)
        add("main", "mass", "count", " q128 steps", 1 - TARGET, None, 1.0, **settings)
    for name, kept in starved(table).items():
        add("chunks", "mean", name, "", 1 - TARGET, kept, FEW)
    for kept, sink, near in ((3, 1, 2), (9, 1, 2), (12, 1, 2), (6, 0, 0)):
        add("frames", "hsa", "cag", f" {kept}/{sink}/{near}", 1 - TARGET, None, few,
            keep_frames=kept, sink_frames=sink, near_frames=near)  # fmt: skip
    for selector in RIVALS:
        add("main", selector, "cag", "", 1 - TARGET, None, 1.0)
    frames = dict(selector=None, score="mass", hierarchy=True)
    forced = dict(name="mass", guarantee=0.25, sink_frames=1, near_frames=2)
    add("extras", "mass", "count", " guarantee", selector=forced)
    add("extras", "mass", "count", " budget", budget=CALIBRATED)
    add("extras", "mass", "count", " refresh 2", refresh=2)
    add("extras", "mass", "cag", " frames", **frames)
    add("extras", "mass", "count", " raster", layout="raster")
    add("extras", "mean", "cag", " raster", layout="raster")
    for law in ("cag", "count"):
        add("extras", "mass-fine", law)
    for selector, law in (
        ("mass", "cag"),
        ("mass-fine", "count"),
        ("lse", "count"),
        ("hsa", "cag"),
    ):
        add("extras", selector, law, " steps", step_share=STEPS)
    add("extras", "mass", "count", " steps guarantee", step_share=STEPS, selector=forced)
    add("extras", "mass", "count", " steps budget", step_share=STEPS, budget=CALIBRATED)
    for step in range(len(STEPS)):  # more blocks: which forward of a chunk loses how much?
        add("extras", "mass", "count", f" step {step} dense", 1 - TARGET, None, few,
            dense_steps=(step,))  # fmt: skip
    for selector, law in LAWS_OF:
        add("laws", selector, law)
    for law in ("cag",) if large else ("cag", "count"):  # three quarters of a minute at 128 px
        add("laws", "oracle", law)
    for keep in (0.05, 0.20, 0.30):
        for selector, law in (("mass", "count"), ("hsa", "cag"), ("mean", "cag"), ("mass", "cag")):
            add("pareto", selector, law, f" keep {keep:g}", keep, None, few)
        if not large:
            add("pareto", "oracle", "cag", f" keep {keep:g}", keep, None, FEW)
    return made


def starved(table, sparsity=0.9):
    """H1: one sparse chunk, all others dense; the same share, or the same number in each."""
    blocks = table.blocks
    share = [max(1, int((1 - sparsity) * n + 1e-9)) for n in blocks]
    same = round(float(np.mean(share)))

    def only(i, kept):
        return tuple(kept if j == i else 0 for j in range(len(blocks)))

    made = {f"only {i + 2} share": only(i, share[i]) for i in range(len(blocks))}
    return made | {f"only {i + 2} number": only(i, same) for i in range(len(blocks))}
