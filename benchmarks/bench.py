"""The GPU benchmark: attention, selection and whole videos beside what a user could have instead.

    python benchmarks/bench.py [--rows REGEX] [--quick] [--cold] [--json FILE] [--against FILE]

Times are device milliseconds a call: the median of at least 15 samples, each one replay of a CUDA
graph of 20 calls after 30 ms of idle, with p10 to p90; rows of one geometry take turns. `sustained`
is the same graph without idle. FLOPs are 4 D for each (query, kept key) pair and head, nothing for
selection. `x dense` is the cuDNN row of the same geometry over this row. Every attention result is
compared with float64 on sampled rows before its first timing, every selection with the CPU's; the
exit status is 1 if one is wrong. `--cold` empties the L2 cache before every call.

`--against FILE` shows the change of every row from a file of `--json`, with `~` where the two
spreads overlap (noise). Figures of two cards, or of two sessions of one, are not comparable.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
import time

import _here  # noqa: F401
import torch
from _arguments import count, new_file, old_file, pattern
from _gpu_calls import host_rows, selection_group, video_group
from _gpu_rows import CHUNKS, OTHERS, attention_group, peers, self_forcing
from timing import ceilings, clocks, machine, measure

import lightforcing as lf

BASELINE = "dense cuDNN"


def groups(options):
    """(name, maker of the works) of every group, in the order of the table."""
    quick, cold = options.quick, options.cold
    geometries = [self_forcing(2), self_forcing(7)] if quick else [*CHUNKS, *OTHERS]
    for g in geometries:
        yield g.name, lambda g=g: attention_group(g, quick=quick, cold=cold)
    for chunk in (7,) if quick else (2, 7, 14):
        g = self_forcing(chunk)
        yield f"{g.name} select", lambda g=g: selection_group(g)
    for frames in (21,) if quick else (21, 63):
        yield f"video {frames} frames", lambda frames=frames: video_group(frames)


def wanted(works, pattern):
    """The works that match, with the baseline of their case so that there is a ratio."""
    if pattern is None:
        return works
    chosen = [w for w in works if pattern.search(w.name)]
    if chosen and all(w.kernel != BASELINE for w in chosen):
        chosen = [w for w in works if w.kernel == BASELINE] + chosen
    return chosen


def as_row(work, dense):
    """One row of the table, JSON-ready."""
    row = {"case": work.case, "kernel": work.kernel}
    if work.failed:
        return row | {"failed": work.failed}
    low, high = work.spread()
    row |= {"ms": work.ms, "p10": low, "p90": high, "samples": len(work.samples)}
    if work.flops:
        row["tflops"] = work.flops / work.ms / 1e9
    if work.sustained:
        row["sustained_ms"] = work.sustained
    if dense is not None and dense.samples:
        row["times_dense"] = dense.ms / work.ms
        if work.sustained and dense.sustained:
            row["times_dense_sustained"] = dense.sustained / work.sustained
    for name in ("host_us", "error"):
        if getattr(work, name) is not None:
            row[name] = getattr(work, name)
    return row | ({"note": work.note} if work.note else {})


HEAD = (
    f"{'case':<22} {'kernel':<34} {'median':>10} {'p10 - p90':>19} {'TFLOP/s':>8} {'x dense':>8} "
    f"{'sustained':>10} {'host':>8} {'error':>8}"
)


def as_line(row, old=None):
    """One line of the table."""
    line = f"{row['case']:<22} {row['kernel']:<34} "
    if "failed" in row:
        return line + f"FAILED: {row['failed']}"
    if "ms" not in row:
        return line + " " * 60 + f"{row['host_us']:6.1f} us"

    def cell(name, form, width):
        return f"{row[name]:{form}}" if row.get(name) is not None else " " * width

    unit, scale = ("us", 1e3) if row["ms"] < 0.1 else ("ms", 1.0)
    spread = f"{scale * row['p10']:.4g} - {scale * row['p90']:.4g}"
    line += f"{scale * row['ms']:7.4g} {unit} {spread:>19} {cell('tflops', '8.1f', 8)} "
    line += f"{cell('times_dense', '7.2f', 7)}  {cell('sustained_ms', '7.4f', 7)} ms "
    line += f"{cell('host_us', '5.1f', 5)} us {cell('error', '8.1e', 8)}"
    return line + (f"  {change(row, old)}" if old else "")


def change(row, old):
    """How much slower (+) or faster (-) than `old`; `~` where that is inside the noise."""
    if "ms" not in row or "ms" not in old:
        return ""
    overlap = row["p10"] <= old["p90"] and old["p10"] <= row["p90"]
    return f"{row['ms'] / old['ms'] - 1:+.1%}" + (" ~" if overlap else "")


def run_group(make, options, pattern):
    """The rows of one group; its tensors are gone afterwards."""
    works = wanted(make(), pattern)
    measure(works, samples=options.samples, sustained=not (options.quick or options.cold))
    dense = next((w for w in works if w.kernel == BASELINE), None)
    rows = [as_row(work, dense) for work in works]
    del works, dense
    gc.collect()
    torch.cuda.empty_cache()
    return rows


def arguments(argv):
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--rows", type=pattern, metavar="REGEX", help="only rows whose 'case kernel' matches"
    )
    parser.add_argument("--quick", action="store_true", help="fewer geometries, no sustained")
    parser.add_argument("--cold", action="store_true", help="empty the L2 cache before every call")
    parser.add_argument("--samples", type=count, default=15, help="of every row (default 15)")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write everything there")
    parser.add_argument(
        "--against", type=old_file, metavar="FILE", help="compare with a --json file"
    )
    parser.add_argument("--list", action="store_true", help="print the groups and stop")
    return parser.parse_args(argv)


def main(argv=None):
    """Run and print; returns the exit status."""
    options = arguments(argv)
    if options.list:
        print("\n".join(name for name, _ in groups(options)))
        return 0
    if not (torch.cuda.is_available() and lf.info()["cuda_built"]):
        print("bench.py needs a GPU and a build with a CUDA half; benchmarks/cpu.py is for CPUs")
        return 2
    lf.warmup()
    pattern = re.compile(options.rows) if options.rows else None
    old = {}
    if options.against:
        try:
            for row in json.loads(options.against.read_text())["rows"]:
                old[row["case"], row["kernel"]] = row
        except (ValueError, KeyError, TypeError):
            print(f"--against: expected what --json wrote, got {options.against}", file=sys.stderr)
            return 2
    record = {"machine": machine(), "clocks_before": clocks(), "ceilings": ceilings()}
    began = time.time()
    print(", ".join(f"{name} {value}" for name, value in record["machine"].items()))
    print("clocks before: " + ", ".join(f"{k} {v}" for k, v in record["clocks_before"].items()))
    print("measured ceilings: {matmul_tflops:.0f} TFLOP/s bf16 8192^3, {copy_tb_s:.2f} TB/s copy"
          .format(**record["ceilings"]))  # fmt: skip
    record["peers"] = peers()
    print("peers: " + ", ".join(f"{n} {v or 'not installed'}" for n, v in record["peers"].items()))
    mode = "L2 emptied before every call" if options.cold else "L2 as the graph leaves it"
    print(f"graph of 20 calls after 30 ms idle, {mode}, median of {options.samples}\n{HEAD}")
    rows = []

    def add(new):
        for row in new:
            print(as_line(row, old.get((row["case"], row["kernel"]))), flush=True)
        rows.extend(new)

    with torch.no_grad():
        for name, make in groups(options):
            try:
                add(run_group(make, options, pattern))
            except Exception as error:  # the other groups still run; the exit status says it
                add([{"case": name, "kernel": "whole group", "failed": repr(error)[:300]}])
        host = [
            r
            for r in host_rows()
            if not pattern or pattern.search(" ".join((r["case"], r["kernel"])))
        ]  # noqa: E501
        add(host)
    record |= {"clocks_after": clocks(), "seconds": time.time() - began, "rows": rows}
    record["settings"] = {"quick": options.quick, "cold": options.cold, "samples": options.samples}
    print("clocks after: " + ", ".join(f"{k} {v}" for k, v in record["clocks_after"].items()))
    print(f"{len(rows)} rows in {record['seconds']:.0f} s")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(any("failed" in row for row in rows) or not rows)


if __name__ == "__main__":
    sys.exit(main())
