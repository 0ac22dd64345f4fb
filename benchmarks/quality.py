"""What sparse attention costs in quality: every selector at the same number of kept blocks.

    python benchmarks/quality.py [--view 64|128] [--clips N] [--only NAME ...] [--device cpu|cuda]
                                 [--weights FILE] [--seconds N] [--out FOLDER] [--results PREFIX]
    python benchmarks/quality.py --plan ROWS [--view 64|128] [--clips N]
    python benchmarks/quality.py --join ROWS ROWS ... [--results PREFIX]
    python benchmarks/quality.py --captured FOLDER [--sparsity S]

The world model of `lightforcing.world` continues procedural clips whose true continuation is known,
once dense and once for each rule, from the same noise. Rows keep the same number of key blocks,
summed over the chunks after the first, and all five passes of these chunks are sparse. Blocks are
16 tokens at 64 px (336 of them at the end, as at 480x832 there are 525) and 64 tokens at 128 px.

Shown is the PSNR against the true continuation, and the paired difference to dense with a bootstrap
95 % interval over clips: of background that was seen before (bare), of regions that come back into
view after two chunks (back), and of the whole frame; how often the two glyphs were redrawn right;
SSIM; and the drift in dB a chunk. On the dense trajectory: the share of attention mass that the
kept keys hold (mean, 5th percentile, against the oracle's) and the output's relative error.

Finished rows are kept in FOLDER, a line each, and not run again at the same commit with the same
weights and clips; rows come most wanted first, and none is begun that would not end in time. The
exit status is 1 if a row failed, 3 if the time did not suffice for all; both are listed.
--plan says what they will take, from the seconds of an earlier run's rows.

--join puts the rows of several trainings (--weights, --only key) side by side: the mean, and the
spread of the trainings.

--captured judges the selectors on q, k and v of your own pipeline, as `lightforcing.capture` wrote
them, all keeping the same share of the blocks.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

import _here  # noqa: F401
import _seeds
import numpy as np
import torch
from _arguments import count, device, duration, new_file, new_folder, number, old_file, seed
from _compiled import compiled
from _judge import Tally, judge, text
from _paired import Store, digest, load_rows
from _rules import CALIBRATED, CHUNK, CHUNKS, KEY_NAMES, TABLES, Row, rows
from cpu import commit, cpu_name

import lightforcing as lf
from lightforcing import capturing, selectors

CALIBRATION = 1_000_000  # exam clips from this number on are measured for budgets, not scored
FIRST = ("main", "presets", "steps", "chunks", "frames")  # groups that come before recall
JUDGED_STEPS = (0, 2, 4)  # of five: the first, the third, and the pass that fills the cache


class Exam:
    """Clips, a model and its dense videos: runs rows one by one.

    Args:
        model: of ``lightforcing.world``.
        clips: of ``lightforcing.world``, exam clips.
        table: a ``_rules.Table``.
        batch: clips rolled out at once.
        seed: of the noise.
        fast: the same model, faster, for whole batches; None runs all with ``model``.
    """

    def __init__(self, model, clips, table, batch, seed=0, fast=None):
        self.model, self.clips, self.table, self.batch, self.seed = model, clips, table, batch, seed
        self.fast = model if fast is None else fast
        self.dense = {}  # by first clip: the dense video, float16
        self._budget = None

    def run(self, row):
        """One row: scores by clip, blocks kept in each chunk, and seconds.

        The dense row keeps its videos; later rows are compared with them where they are there.
        """
        from lightforcing import world

        share = round(len(self.clips) * row.clips)
        count = min(len(self.clips), max(1, share))
        budget = self.budget() if row.settings.get("budget") == CALIBRATED else None
        begin, scores, config = time.perf_counter(), {}, row.config(self.table, budget)
        model = self.model if count % self.batch else self.fast
        handle = None if config is None else lf.patch(model, config=config)
        try:
            for start in range(0, count, self.batch):
                clip = self.clips[start : min(start + self.batch, count)]
                video = world.rollout(model, clip, seed=self.seed)
                found = world.metrics.score(video, clip) | self._distance(row, start, video)
                for name, values in found.items():
                    scores.setdefault(name, []).extend(torch.as_tensor(values).tolist())
            chunks = None if handle is None else handle.stats()["chunks"]
        finally:
            if handle is not None:
                handle.unpatch()
        seconds = time.perf_counter() - begin
        return {
            "group": row.group,
            "settings": None if config is None else config.to_dict(),
            "clips": count,
            "planned": list(row.kept),
            "kept": self._kept(chunks),
            "scores": {n: [round(x, 4) for x in values] for n, values in scores.items()},
            "seconds": round(seconds, 2),
        }

    def budget(self):
        """Blocks of every head, measured once on other clips than those that are scored."""
        if self._budget is None:
            from lightforcing import world

            count = 2 if self.table.view <= 64 else 1
            first, calls = world.EXAM_SEED + CALIBRATION, []
            clip = world.clips(range(first, first + count), view=self.table.view)

            def keep(call):
                tensors = {n: getattr(call, n).clone() for n in "qkv"}
                calls.append(capturing.Captured(**tensors, facts=call.facts))

            layers = range(self.model.config.num_layers)
            asked = dict(layers=layers, chunks=(3, 5, 7), steps=(0, 2))
            with capturing.watch(self.model, keep, **asked):
                world.rollout(self.model, clip, seed=self.seed)
            row = Row("", selector="mass", kept=self.table.counts("count"))
            self._budget = selectors.calibrate(calls, row.config(self.table))
        return self._budget

    def _kept(self, chunks):
        """Mean blocks that a row of queries read in chunks 2, 3 ..., as counted by the handle."""
        if chunks is None:
            return list(self.table.blocks)
        density = {c["chunk"]: c["density"] for c in chunks}
        return [round(density[i + 2] * n, 2) for i, n in enumerate(self.table.blocks)]

    def _distance(self, row, start, video):
        """Mean squared distance to the dense video by chunk, of colours scaled to [0, 1]."""
        if row.selector is None:
            self.dense[start] = video.half()
        if start not in self.dense:
            return {}
        dense = self.dense[start][: len(video)].to(video.dtype)
        square = ((video - dense) / 2).square().mean((2, 3, 4)).unflatten(1, (-1, CHUNK)).mean(2)
        return {f"from_dense_{c}": square[:, c] for c in range(1, square.shape[1])}

    def judge(self, names, count, layers=None, steps=JUDGED_STEPS):
        """Recall and output error on the dense trajectory of the first clips, by law cag."""
        from lightforcing import world

        tally, table = Tally(), self.table
        kept = dict(enumerate(table.counts("cag"), 2))

        def see(call):
            sizes = {"block_q": table.block_q, "block_k": table.block_k}
            found = judge(call, names, kept=kept[call.facts.chunk], notes=tally.notes, **sizes)
            tally.add(call.facts, found)

        layers = range(self.model.config.num_layers) if layers is None else layers
        watch = capturing.watch(self.model, see, layers=layers, chunks=list(kept), steps=steps)
        with watch:
            world.rollout(self.model, self.clips[:count], seed=self.seed)
        return tally


def run_rows(exam, todo, store, seconds, report, slowest=None):
    """Run what is not stored yet, as long as it fits into ``seconds``.

    ``slowest`` is what rows of a kind took with all clips, in earlier calls and, afterwards, here.

    Returns:
        What is missing now: ``failed``, why by name, and ``no_time``, names.
    """
    failed, no_time = {}, []
    begin, slowest = time.perf_counter(), {} if slowest is None else slowest
    for row in todo:
        missing = any(r.name not in store for r in todo)
        needed = row.selector is None and not exam.dense and missing
        if row.name in store and not needed:
            continue
        spent = time.perf_counter() - begin
        kind = row.selector, "budget" in row.settings
        usual = float(np.median(list(slowest.values()))) if slowest else 0.0
        guess = slowest.get(kind, usual)
        if spent + guess * row.clips > seconds:
            report(f"no time left for {row.name}")
            no_time += [row.name]
            continue
        try:
            made = exam.run(row)
        except Exception as error:  # one row that fails must not lose the others
            failed[row.name] = f"{type(error).__name__}: {error}"
            report(f"{row.name}: {failed[row.name]}")
            continue
        if row.name not in store:
            store.put(row.name, **made)
        slowest[kind] = made["seconds"] / row.clips
        report(brief(row.name, made))
    return {"failed": failed, "no_time": no_time}


def brief(name, made):
    """One line as a row ends."""

    def mean(key):
        values = [x for x in made["scores"].get(key, ()) if x == x]
        return sum(values) / len(values) if values else float("nan")

    glyphs = f"{mean('glyph_easy'):.2f} {mean('glyph_hard'):.2f}"
    return (
        f"{name:26} all {mean('all'):6.2f} bare {mean('bare'):6.2f} back {mean('back'):6.2f} "
        f"glyphs {glyphs} kept {sum(made['kept']):6.1f}  {made['clips']} clips {made['seconds']} s"
    )


def captured(args):
    """The table of --captured; its exit code."""
    calls = capturing.load_folder(args.captured, args.device)
    names = known(args.only, selectors.names(), "selector") or selectors.names()
    tally, names, count = Tally(), [n for n in names if n != "dense"], 0
    for call in calls:
        found = judge(call, names, sparsity=args.sparsity, block_q=args.block_q or 128,
                      block_k=args.block_k or 64, notes=tally.notes)  # fmt: skip
        tally.add(call.facts, found)
        count += 1
    print(f"{count} calls of {args.captured}, {1 - args.sparsity:.0%} of the key blocks kept")
    for by in ((), ("chunk",)):
        print("\n".join(text(tally.means(by), by)))
    for name, why in tally.notes.items():
        print(f"{name} left out: {why}")
    if args.results:
        record = {"facts": facts(args), "means": tally.means(), "cells": tally.cells}
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    return 0


def facts(args):
    """What the figures depend on, and what made them."""
    cuda = args.device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(args.device) if cuda else cpu_name(),
        "commit": args.commit or os.environ.get("LIGHTFORCING_COMMIT") or commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def world_facts(args, table, weights):
    made = facts(args)
    return made | {
        "weights": weights,
        "view": table.view,
        "frame_tokens": table.frame_tokens,
        "block_k": table.block_k,
        "block_q": table.block_q,
        "chunks": CHUNKS,
        "clips": args.clips,
        "seed": args.seed,
        "sweep": args.sweep,
        "compiled": args.compile,
    }


def parser():
    made = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--view", type=int, choices=list(TABLES), default=64, help="default: 64")
    made.add_argument(
        "--clips", type=count, help="default: 256 at 64 px and 128 at 128 px; 4 on CPU"
    )
    made.add_argument("--only", nargs="+", default=[], metavar="NAME", help="rows (or selectors)")
    made.add_argument(
        "--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    made.add_argument("--weights", type=Path, help="folder of an export; default: the package's")
    made.add_argument("--untrained", action="store_true", help="random weights, to try this out")
    made.add_argument(
        "--compile", action="store_true", help="all but the attention of a block, whole batches"
    )
    made.add_argument("--batch", type=count, help="clips at once; default: 64, 16 at 128 px, CPU 2")
    made.add_argument("--seconds", type=duration, default=1e9, help="begin no row that ends later")
    made.add_argument("--judged", type=number(int, 0, 10**6), help="clips for recall; 0: none")
    made.add_argument("--seed", type=seed, default=0, help="of the noise")
    made.add_argument("--sweep", choices=["quick", "slow"], default="quick", help="of the clips")
    made.add_argument("--commit", help="where there is no git; default: LIGHTFORCING_COMMIT")
    made.add_argument("--out", type=new_folder, default=Path("build/quality"), help="finished rows")
    made.add_argument(
        "--results", type=new_file, metavar="PREFIX", help="write PREFIX.json .txt .png"
    )
    made.add_argument("--beside", type=old_file, metavar="ROWS", help="another run's finished rows")
    made.add_argument(
        "--plan", type=old_file, metavar="ROWS", help="an earlier run's finished rows"
    )
    made.add_argument(
        "--join", type=old_file, nargs="+", metavar="ROWS", help="of several trainings"
    )
    made.add_argument("--captured", type=Path, metavar="FOLDER", help="of lightforcing.capture")
    made.add_argument(
        "--sparsity", type=number(float, 0, 0.999), default=0.88, help="with --captured"
    )
    made.add_argument("--block-q", type=number(int, 16, 128), help="query rows that share a list")
    made.add_argument(
        "--block-k",
        type=int,
        choices=(16, 32, 64, 128),
        help="tokens of a key block; with --captured",
    )
    return made


def known(only, names, kind, more=()):
    """The names of --only, if there are such."""
    unknown = [n for n in only if n not in names and n not in more]
    if unknown:
        raise ValueError(f"--only: no {kind} {', '.join(unknown)}; there are {', '.join(names)}")
    return only


def chosen(every, only):
    """Rows by name, selector or group, the dense one always; ``key`` is those of every training."""
    more = {r.selector for r in every} | {r.group for r in every} | {"key"}
    known(only, [r.name for r in every], "row", more)
    asked = set(only)

    def wanted(row):
        kinds = {row.name, row.selector, row.group} | ({"key"} if row.name in KEY_NAMES else set())
        return not only or row.selector is None or bool(kinds & asked)

    return [r for r in every if wanted(r)]


def plan(args):
    """Print the rows in their order with clips and the seconds they should take; the exit code.

    Rows of a selector that the earlier run has not count as its slowest ones do.
    """
    table = TABLES[args.view]
    clips = args.clips or (256 if args.view == 64 else 128)
    spent = {}
    for row in load_rows(args.plan):
        if "scores" in row and row["key"].get("view") == args.view:
            spent.setdefault(row["name"].split()[0], []).append(row["seconds"] / row["clips"])
    if not spent:
        raise ValueError(f"--plan: expected rows of {args.view} px in {args.plan}, got none")
    spent = {name: min(each) for name, each in spent.items()}  # the first of a kind warms up
    total = 0.0
    for row in chosen(rows(table, selectors.names()), args.only):
        count = max(1, round(clips * row.clips))
        seconds = count * spent.get(row.selector or "dense", max(spent.values()))
        total += seconds
        print(f"{row.name:28}{row.group:10}{count:5} clips{seconds:7.1f} s{total:8.1f} s")
    return 0


def prepare(args):
    """The exam, the rows to run and the store of a table, as the arguments ask."""
    from lightforcing import world

    cpu = not args.device.startswith("cuda")
    table = TABLES[args.view]
    todo = chosen(rows(table, selectors.names()), args.only)
    args.clips = args.clips or (4 if cpu else 256 if args.view == 64 else 128)
    model = world.load_world(args.weights, device=args.device, untrained=args.untrained)
    seeds = range(world.EXAM_SEED, world.EXAM_SEED + args.clips)
    clips = world.clips(seeds, view=table.view, sweep=args.sweep, device=args.device)
    fast = compiled(model) if args.compile else None
    exam = Exam(model, clips, table, args.batch or (2 if cpu else table.batch), args.seed, fast)
    store = Store(args.out / f"rows-{args.view}.jsonl", world_facts(args, table, digest(model)))
    return exam, todo, store


def put_recall(exam, store, clips=None):
    """Judge every selector on the dense trajectory of the first clips, and store it.

    All logits of a call are looked at once for every selector: at 128 px, and on a CPU, only one
    clip, some layers and one step are.
    """
    depth, steps = exam.model.config.num_layers, (2,)
    layers = (0, depth // 2, depth - 1)
    if exam.model.device.type == "cuda":
        layers = range(1, depth, 2)
        if exam.table.view == 64:
            layers, steps = range(depth), JUDGED_STEPS
    clips = clips or (2 if len(layers) == depth else 1)
    names = [n for n in selectors.names() if n != "dense"]
    tally = exam.judge(names, clips, layers, steps)
    store.put(
        "recall", clips=clips, layers=list(layers), steps=list(steps), cells=tally.cells,
        notes=tally.notes,
    )  # fmt: skip


def main(argv=None):
    args = parser().parse_args(argv)
    try:
        if args.captured:
            return captured(args)
        if args.join:
            print(_seeds.report(args.join, args.results))
            return 0
        return plan(args) if args.plan else table_of_rows(args)
    except (ValueError, OSError) as error:
        print(f"quality: {error}", file=sys.stderr)
        return 2


def table_of_rows(args):
    """The table of the world model; its exit code."""
    import _quality_report

    begin = time.perf_counter()
    exam, todo, store = prepare(args)

    def report(line):
        print(f"{time.perf_counter() - begin:6.1f} s  {line}", flush=True)

    facts = store.key
    report(
        "{device}, commit {commit}, weights {weights}, {clips} clips of {view} px".format(**facts)
    )

    def left():
        return args.seconds - (time.perf_counter() - begin)

    if not args.device.startswith("cuda") and "dense" not in store:
        run_rows(exam, [row for row in todo if row.name == "dense"], store, left(), report)
        rest = [row for row in todo if row.name not in store]
        if "dense" in store and rest:  # the other rows are about as slow
            minutes = store["dense"]["seconds"] * sum(row.clips for row in rest) / 60
            report(f"{len(rest)} rows more, about {minutes:.0f} minutes; shorter: --only key, "
                   "--clips 1, --judged 0, --seconds 600")  # fmt: skip
    first = [r for r in todo if r.selector is None or r.group in FIRST]
    rest, slowest = [r for r in todo if r.selector is None or r not in first], {}
    missing = run_rows(exam, first, store, left(), report, slowest)
    failed, no_time = missing["failed"], missing["no_time"]
    if args.judged != 0 and "recall" not in store:
        if left() > 0:
            try:
                put_recall(exam, store, args.judged)
                report("recall")
            except RuntimeError as error:  # memory, on a GPU: the rows are worth more
                failed["recall"] = f"{type(error).__name__}: {error}"
                report(f"recall: {failed['recall']}")
        else:
            no_time.append("recall")
    missing = run_rows(exam, rest, store, left(), report, slowest)
    failed |= missing["failed"]
    no_time += [n for n in missing["no_time"] if n not in no_time]
    summary = _quality_report.summary(store, exam.table, facts)
    summary["missing"] = {"failed": failed, "no_time": no_time}
    print(_quality_report.text(summary))
    if args.beside:
        print("\n".join(_quality_report.beside(store, load_rows(args.beside), args.beside.name)))
    if args.results:
        _quality_report.write(summary, args.results)
    return 1 if failed else 3 if no_time else 0


if __name__ == "__main__":
    sys.exit(main())
