"""Tables of several trainings in one: what a rule costs with each, and how far they lie apart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from _paired import difference, interval, load_rows, show

MEASURES = ("bare", "back", "all")
# Of Student's t for 95 % with 1, 2 ... degrees of freedom: for 2, 3 ... trainings.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
ALIKE = ("view", "block_k", "block_q", "frame_tokens", "seed", "sweep")  # of every row
# Asked of every training: minuend and subtrahend.
PAIRS = (
    ("mean cag", "mean uniform"),
    ("mean count", "mean cag"),
    ("hsa cag", "mean cag"),
    ("mass cag", "mean cag"),
    ("mass cag", "hsa cag"),
    ("mass count", "hsa cag"),
    ("mass count", "mass cag"),
    ("mass count steps", "mass count"),
    ("mass count steps", "hsa cag"),
)


def tables(paths):
    """The rows of each training, ``{weights: {name: row}}``, in the order of their first rows.

    Args:
        paths: files of finished rows; one may hold several trainings, one training may be spread
            over several.

    Raises:
        ValueError: rows that cannot be compared: of another size, noise or sweep.
    """
    found, place = {}, None
    for path in paths:
        for row in load_rows(path):
            if "scores" not in row:
                continue
            if "weights" not in row.get("key", {}):
                raise ValueError(
                    f"--join: expected rows that name their weights, got {row.get('name')} "
                    f"of {path} without"
                )
            here = {n: row["key"].get(n) for n in ALIKE}
            place = place or here
            if here != place:
                wrong = next(n for n in ALIKE if here[n] != place[n])
                raise ValueError(
                    f"--join: expected rows of one {wrong}, got {place[wrong]} and {here[wrong]}"
                )
            found.setdefault(row["key"]["weights"], {})[row["name"]] = row
    return found


def _scores(row, name):
    return np.array([np.nan if x is None else x for x in row["scores"][name]], np.float64)


def _over(tables, first, second, name):
    """First less second for each training; their mean, and how far apart the trainings are."""
    each, clips = [], []
    for rows in tables.values():
        a, b = _scores(rows[first], name), _scores(rows[second], name)
        each.append(difference(a, b))
        n = min(len(a), len(b))
        clips.append(a[:n] - b[:n])
    n = min(map(len, clips))
    means = [e[0] for e in each if e[0] is not None]
    together = interval(np.mean([c[:n] for c in clips], 0))
    spread = float(np.std(means, ddof=1)) if len(means) > 1 else None
    return {
        "each": each,
        "mean": together,
        "low": min(means, default=None),
        "high": max(means, default=None),
        "spread": spread,
        "margin": _margin(spread, len(means)),
    }


def _margin(spread, count):
    """Half the 95 % interval of the mean over trainings, if they are a normal sample."""
    if spread is None or count - 2 >= len(STUDENT):
        return None
    return STUDENT[count - 2] * spread / count**0.5


def join(tables):
    """The rows and questions that every training has, as plain values.

    Args:
        tables: from :func:`tables`.

    Returns:
        A dict: ``trainings`` (weights, commits, device), ``rows`` and ``questions``. Each has for
        every measure ``each`` (mean and 95 % interval over clips, a training each), ``mean`` (of
        the trainings' means, interval over the clips that all have), ``low``, ``high`` and
        ``spread`` (standard deviation) of the trainings' means, and ``margin``, half the width of
        Student's 95 % interval of their mean (None for more than ten trainings).

    Raises:
        ValueError: fewer than two trainings, or one without its dense row.
    """
    if len(tables) < 2:
        raise ValueError(f"--join: expected rows of at least two trainings, got {len(tables)}")
    bare = [w for w, rows in tables.items() if "dense" not in rows]
    if bare:
        raise ValueError(f"--join: expected a dense row for every training, got none of {bare[0]}")
    shared = [n for n in next(iter(tables.values())) if all(n in t for t in tables.values())]
    trainings = []
    for weights, rows in tables.items():
        used = [rows[n]["key"] for n in shared]
        facts = {n: sorted({str(k.get(n)) for k in used}) for n in ("commit", "device", "torch")}
        trainings.append({"weights": weights, "clips": used[0].get("clips")} | facts)
    dense = {
        n: [interval(_scores(t["dense"], n))[0] for t in tables.values()]
        for n in (*MEASURES, "glyph_easy", "glyph_hard")
    }
    made = {"trainings": trainings, "dense": dense, "rows": [], "questions": []}
    for name in shared:
        if name == "dense":
            continue
        row = {"name": name, "clips": [t[name]["clips"] for t in tables.values()]}
        row |= {n: _over(tables, name, "dense", n) for n in MEASURES}
        for glyph in ("glyph_easy", "glyph_hard"):
            row[glyph] = [interval(_scores(t[name], glyph))[0] for t in tables.values()]
        made["rows"].append(row)
    for first, second in PAIRS:
        if first in shared and second in shared:
            pair = {"first": first, "second": second}
            made["questions"].append(pair | {n: _over(tables, first, second, n) for n in MEASURES})
    return made


def _plain(values, between):
    """A number for each training, a dash where it has none."""
    return between.join("-" if x is None else f"{x:.2f}" for x in values)


def _cell(found):
    """Mean of the trainings, its 95 % margin, and the lowest and the highest of them."""
    if found["mean"][0] is None or found["low"] is None:
        return "-"
    mean = np.mean([e[0] for e in found["each"] if e[0] is not None])
    margin = "" if found["margin"] is None else f" ±{found['margin']:.2f}"
    return f"{mean:+.2f}{margin} ({found['low']:+.2f} {found['high']:+.2f})"


def text(made):
    """What :func:`join` found, as lines."""
    lines = [f"{len(made['trainings'])} trainings of the world model, the same exam clips"]
    for number, facts in enumerate(made["trainings"]):
        lines.append(
            f"  {number}: weights {facts['weights']}, {facts['clips']} clips, commit "
            f"{', '.join(facts['commit'])}, {', '.join(facts['device'])}"
        )
    dense = [_plain(made["dense"][n], "/") for n in MEASURES]
    lines += [
        "",
        "PSNR in dB; mean over the trainings of the paired difference ± its 95 % margin over "
        "trainings (Student's t) (lowest and highest training)",
        f"{'':28}" + "".join(f"{n:30}" for n in (*MEASURES, "small glyph, each")).rstrip(),
        f"{'dense':28}" + "".join(f"{d:30}" for d in dense).rstrip(),
    ]
    for row in made["rows"]:
        cells = "".join(f"{_cell(row[n]):30}" for n in MEASURES)
        glyphs = _plain(row["glyph_hard"], " ")
        lines.append(f"{row['name'] + ' - dense':28}{cells}{glyphs}")
    lines.append("")
    for pair in made["questions"]:
        label = f"{pair['first']} - {pair['second']}"
        lines.append(f"{label:28}" + "".join(f"{_cell(pair[n]):30}" for n in MEASURES).rstrip())
    lines += ["", "each training, with 95 % intervals over clips"]
    for pair in (*made["rows"], *made["questions"]):
        label = pair.get("name") or f"{pair['first']} - {pair['second']}"
        for number in range(len(made["trainings"])):
            cells = "".join(f"{show(pair[n]['each'][number]):30}" for n in MEASURES).rstrip()
            lines.append(f"{label if number == 0 else '':30}{number} {cells}")
    return "\n".join(lines)


def report(paths, results=None):
    """The text of :func:`join` over files; writes PREFIX.json and .txt where ``results`` says."""
    made = join(tables(paths))
    shown = text(made)
    if results is not None:
        results = Path(results)
        results.parent.mkdir(parents=True, exist_ok=True)
        results.with_suffix(".json").write_text(json.dumps(made, indent=1) + "\n")
        results.with_suffix(".txt").write_text(shown + "\n")
    return shown
