"""The quality table in figures (JSON), as text and as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import wrap

import numpy as np
from _judge import Tally
from _judge import text as judged_text
from _paired import difference, interval, show
from _rules import OTHER_STEPS, STEPS, steps_note

from lightforcing.selectors import make, names

PSNR = ("bare", "back", "all")  # the sharp ones first: sprites hide what attention does in `all`
FAR = -6.0  # dB: worse rows are numbers in the picture
# (what is asked, minuend, subtrahend); a row that is missing leaves its line out.
RIVALS = ("mean", "hsa", "sta", "radial", "vmoba", "vsa", "vsa-cube", "sparge", "sparge-topp",
          "sparge-sim", "random")  # fmt: skip
QUESTIONS = {
    "H2, schedules at equal totals": [
        ("mean cag", "mean uniform"),
        ("mean count", "mean cag"),
        ("mean cag", "mean reversed"),
        ("hsa cag", "hsa uniform"),
        ("hsa count", "hsa cag"),
        ("mass cag", "mass uniform"),
        ("mass count", "mass cag"),
        ("mass-fine count", "mass-fine cag"),
        ("oracle count", "oracle cag"),
        ("mass count keep 0.05", "mass cag keep 0.05"),
        ("mass count keep 0.2", "mass cag keep 0.2"),
        ("mass count keep 0.3", "mass cag keep 0.3"),
    ],
    "H3, the paper's frame stage against others at its schedule": [
        *(("hsa cag", f"{name} cag") for name in RIVALS if name != "hsa"),
        ("mass cag frames", "mass cag"),
    ],
    "H4, frames kept by the frame stage": [
        ("hsa cag 3/1/2", "hsa cag"),
        ("hsa cag 9/1/2", "hsa cag"),
        ("hsa cag 12/1/2", "hsa cag"),
        ("hsa cag 6/0/0", "hsa cag"),
    ],
    "Ours against the others, at the paper's schedule": [
        *(("mass cag", f"{name} cag") for name in RIVALS),
        ("mass cag", "lse cag"),
        ("mass cag", "oracle cag"),
        ("mass-fine cag", "mass cag"),
        ("mass-fine cag", "oracle cag"),
    ],
    "Ours, switches": [
        ("mass count", "hsa cag"),
        ("mass count", "mean count"),
        ("mass count", "lse count"),
        ("mass count", "oracle count"),
        ("mass-fine count", "mass count"),
        ("mass count budget", "mass count"),
        ("mass count guarantee", "mass count"),
        ("mass count refresh 2", "mass count"),
        ("mass count raster", "mass count"),
        ("mean cag raster", "mean cag"),
        ("mass count q128", "mass count"),
        ("mean cag q128", "mean cag"),
        ("hsa cag q128", "hsa cag"),
    ],
    "Ours, blocks by forward of a chunk": [
        ("mass count steps", "mass count"),
        ("mass count steps", "hsa cag"),
        ("mass count steps", "oracle cag"),
        ("mass count steps guarantee", "mass count steps"),
        ("mass count steps budget", "mass count steps"),
        ("mass count q128 steps", "mass count q128"),
        ("mass count q128 steps", "mass count steps"),
        ("mass cag steps", "mass cag"),
        ("mass-fine count steps", "mass-fine count"),
        ("mass-fine count steps", "mass count steps"),
        ("lse count steps", "lse count"),
        ("lse count steps", "mass count steps"),
        ("hsa cag steps", "hsa cag"),
        *((f"mass count step {i} dense", "mass count") for i in range(len(STEPS))),
        *((f"mass count{steps_note(shares)}", "mass count steps") for shares in OTHER_STEPS),
    ],
    "Presets as shipped": [
        ("preset fast", "preset fast even"),
        ("preset balanced", "preset balanced even"),
        ("preset quality", "preset quality even"),
        ("preset fast", "preset paper"),
        ("preset balanced", "preset fast"),
        ("preset quality", "preset balanced"),
        ("preset quality q64", "preset quality"),
        ("preset quality linear", "preset quality"),
        ("preset fast q64", "preset fast"),
    ],
}


def _scores(row, name):
    return [np.nan if x is None else x for x in row["scores"][name]]


def summary(store, table, facts):
    """Everything that is shown, as plain values.

    Args:
        store: a ``_paired.Store`` with the finished rows.
        table: a ``_rules.Table``.
        facts: of the run.
    """
    dense, lines = store.get("dense"), []
    for name in store.names:
        row = store[name]
        if "scores" not in row:
            continue
        shown = ("name", "group", "clips", "planned", "kept", "seconds", "settings")
        line = {k: row.get(k) for k in shown}
        line["density"] = sum(row["kept"]) / sum(table.blocks)
        line["mean"] = {n: interval(_scores(row, n))[0] for n in row["scores"]}
        if dense is not None and name != "dense":
            line["against_dense"] = {
                n: difference(_scores(row, n), _scores(dense, n))
                for n in row["scores"]
                if n in dense["scores"] and not n.startswith("from_dense")
            }
        lines.append(line)
    made = {"facts": facts, "blocks": list(table.blocks), "rows": lines}
    made["questions"] = {
        title: [
            {"first": a, "second": b} | {n: _compare(store, a, b, n) for n in PSNR}
            for a, b in pairs
            if a in store and b in store
        ]
        for title, pairs in QUESTIONS.items()
    }
    used = {line["name"].split()[0] for line in lines}
    made["notes"] = {n: make(n).notes for n in names() if n in used and make(n).notes}
    recall = store.get("recall")
    if recall is not None:
        tally = Tally()
        tally.cells = recall["cells"]
        heads = {n: tally.heads(n).round(4).tolist() for n in ("oracle", "mass", "mean")
                 if any(c["selector"] == n for c in tally.cells)}  # fmt: skip
        made["recall"] = {
            **{k: recall[k] for k in ("clips", "layers", "steps")},
            "means": tally.means(),
            "by_chunk": tally.means(("chunk",)),
            "by_layer": tally.means(("layer",)),
            "by_step": tally.means(("step",)),
            "heads": heads,
            "left_out": recall["notes"],
        }
    return made


def _compare(store, a, b, name):
    return difference(_scores(store[a], name), _scores(store[b], name))


def text(made):
    """The table, the paired comparisons and recall, as lines."""
    facts = made["facts"]
    lines = [
        "{device}; commit {commit}, weights {weights}, torch {torch}".format(**facts),
        "{view} px, {frame_tokens} tokens a frame, key blocks of {block_k}, query blocks of "
        "{block_q}, {sweep} sweep, noise seed {seed}".format(**facts),
        f"resident blocks in chunks 2 to 7: {' '.join(map(str, made['blocks']))}",
        *(["blocks compiled apart from their attention"] if facts.get("compiled") else []),
        "PSNR in dB against the true continuation; vs: paired difference to dense, 95 % over clips",
        "",
        f"{'rule':26}{'clips':>6}{'kept':>7}{'bare':>7}  {'vs dense':22}{'back':>6}  "
        f"{'vs dense':22}{'glyphs':>10}{'all':>7}  {'vs dense':22}{'SSIM':>6}{'drift':>7}{'s':>7}",
    ]
    for row in made["rows"]:
        mean, vs = row["mean"], row.get("against_dense", {})
        cells = [f"{row['name']:26}{row['clips']:>6}{sum(row['kept']):>7.0f}"]
        for name, width in zip(PSNR, (7, 6, 7), strict=True):
            if name == "all":
                cells.append(f"{_n(mean, 'glyph_easy'):>5} {_n(mean, 'glyph_hard'):>4}")
            cells.append(f"{_n(mean, name):>{width}}  {show(vs.get(name, (None,))):22}")
        cells.append(f"{_n(mean, 'ssim', 3):>6}{_n(mean, 'drift'):>7}{row['seconds']:>7.1f}")
        lines.append("".join(cells).rstrip())
    for title, pairs in made["questions"].items():
        if pairs:
            lines += ["", f"{title}: paired differences"]
            lines.append(f"{'':44}" + "".join(f"{n:24}" for n in PSNR).rstrip())
        for pair in pairs:
            label = f"{pair['first']} - {pair['second']}"
            lines.append(f"{label:44}" + "".join(f"{show(pair[n]):24}" for n in PSNR).rstrip())
    lines += _missing(**made.get("missing", {}))
    lines += _injections(made["rows"])
    if "recall" in made:
        recall = made["recall"]
        places = " and ".join(f"{n} {', '.join(map(str, recall[n]))}" for n in ("layers", "steps"))
        lines += [
            "",
            f"on the dense trajectory of {recall['clips']} clips, {places}, counted from 0;",
        ]
        lines.append("as many blocks kept as by law cag; recall 5 %: 5th percentile of query rows")
        lines += judged_text(recall["means"])
        lines += [f"{name} left out: {why}" for name, why in recall["left_out"].items()]
    if made["notes"]:
        lines += ["", "where the rules are from, and how ours differ"]
    for name, note in made["notes"].items():
        lines += wrap(note, 100, initial_indent=f"{name:12}", subsequent_indent=" " * 12)
    return "\n".join(lines)


def _missing(failed=(), no_time=()):
    """What was asked for and is not in the table, and why."""
    lines = []
    if failed:
        lines += ["", f"failed: {len(failed)}"]
        lines += [f"{name}: {why}" for name, why in failed.items()]
    if no_time:
        names = wrap(", ".join(no_time), 100)
        lines += ["", f"no time was left for {len(no_time)}:", *names]
    return lines


def _injections(rows):
    """H1: distance to the dense video from the sparse chunk on, and at a fixed horizon."""
    found = [r for r in rows if r["group"] == "chunks" and "from_dense_1" in r["mean"]]
    if not found:
        return []
    lines = ["", "H1, one sparse chunk: mean squared distance to the dense video x 1e4, by chunk"]
    for row in found:
        far = [row["mean"][n] for n in sorted(row["mean"]) if n.startswith("from_dense")]
        cells = ["      -" if x < 1e-9 else f"{1e4 * x:7.2f}" for x in far]
        lines.append(f"{row['name']:26}" + "".join(cells))
    return lines


def beside(store, others, name):
    """Lines: this run less another one, clip by clip, for the rows of both with these weights."""
    lines = ["", f"this run - {name}, the same clips: paired differences"]
    lines.append(f"{'':26}{'clips':>6}  " + "".join(f"{n:24}" for n in PSNR).rstrip())
    facts = store.key
    for row in others:
        same = all(row["key"].get(n) == facts.get(n) for n in ("weights", "view", "seed", "sweep"))
        mine = store.get(row["name"]) if same and "scores" in row else None
        if mine is not None:
            pairs = [difference(_scores(mine, n), _scores(row, n)) for n in PSNR]
            count = min(mine["clips"], row["clips"])
            cells = "".join(f"{show(p):24}" for p in pairs).rstrip()
            lines.append(f"{row['name']:26}{count:>6}  {cells}")
    return lines


def _n(values, name, digits=2):
    value = values.get(name)
    return "-" if value is None else f"{value:.{digits}f}"


def picture(made, path):
    """A point and its interval for every row of the main groups: bare, back and all."""
    from lightforcing import plots

    rows = [r for r in made["rows"] if "against_dense" in r and r["group"] in ("main", "laws")]
    rows = sorted(rows, key=lambda r: r["against_dense"]["all"][0])
    if not rows:
        return
    page, axes = plots.figure(3, width=12, height=1.2 + 0.24 * len(rows))
    titles = {"bare": "background seen before", "back": "back in view", "all": "whole frame"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for y, row in enumerate(rows):
            mean, low, high = row["against_dense"][name]
            if mean is None:
                continue
            colour = _colour(plots, row["name"])
            if mean < FAR:  # a number in place of a point that would squeeze all others together
                place = dict(xycoords=("axes fraction", "data"), va="center", fontsize=9)
                axis.annotate(f"{mean:.1f}", (0.02, y), color=colour, **place)
                continue
            axis.plot([low, high], [y, y], color=colour, linewidth=2)
            axis.plot([mean], [y], "o", color=colour, markersize=5)
        axis.axvline(0, color="#bbbbbb", linewidth=1, zorder=0)
        axis.set(title=title, xlabel="PSNR - dense, dB", yticks=range(len(rows)), yticklabels=[])
        axis.set_ylim(-0.6, len(rows) - 0.4)
        axis.grid(axis="x", color="#eeeeee")
    axes[0].set_yticklabels([r["name"] for r in rows])
    facts = made["facts"]
    page.suptitle(
        f"{facts['view']} px, blocks of {facts['block_k']} tokens, the same number kept in every "
        f"row ({rows[0]['density']:.0%}); up to {facts['clips']} clips, 95 % intervals",
        fontsize=11,
    )
    page.savefig(path, dpi=110)


def _colour(plots, name):
    if name.startswith("mass"):
        return plots.ORANGE
    if name.startswith("hsa"):
        return plots.BLUE
    return plots.GREEN if name.startswith("oracle") else plots.GREY


def write(made, prefix):
    """PREFIX.json, PREFIX.txt and PREFIX.png."""
    prefix = Path(prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    prefix.with_suffix(".json").write_text(json.dumps(_rounded(made), indent=1) + "\n")
    prefix.with_suffix(".txt").write_text(text(made) + "\n")
    picture(made, prefix.with_suffix(".png"))


def _rounded(value):
    """Four decimals are more than the intervals justify."""
    if isinstance(value, float):
        return None if value != value else round(value, 6)
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(v) for v in value]
    return value
