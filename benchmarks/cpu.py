"""Attention on this CPU: ours dense, torch's SDPA, and 12 % of the key blocks with selection.

    python benchmarks/cpu.py [--heads N | --full] [--rounds N] [--dtype float32] [--threads N]
                             [--clock wall | cpu] [--json FILE]

The case is chunk 7 of 7 of Self Forcing 1.3B: 4680 queries (3 frames of 1560 tokens), the last of
32760 keys, D 128, in the model's layout [B, L, H, D] with 12 heads. By default 2 of the 12 heads
are run (their strides are those of 12), which takes a minute or two on two cores; --full runs all.

Everything runs in one process, row after row within a round, so that a busy machine slows every
row alike. Shown are the median of the rounds, p10 to p90, GFLOP/s and the median over the rounds of
"torch's time / this row's time" and "our dense time / this row's time". On a machine that is busy
with other work, `--clock cpu --threads 1` counts this process's processor seconds instead.

FLOPs are 4 D for each (query, kept key) pair and head: 2 D for q k^T, 2 D for the weights times v.
Selection and exponentials count as none, so the GFLOP/s of a row with selection include its cost.

Before any timing, sampled rows of every result are compared with float64; the exit status is 1 if
one errs by more than twice what torch does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import _here  # noqa: F401
import numpy as np
import torch
import torch.nn.functional as F
from _arguments import count, new_file, number

import lightforcing as lf

FRAME_TOKENS, Q_FRAMES, K_FRAMES, HEADS, DIM = 1560, 3, 21, 12, 128
SPARSITY = 0.88
SAMPLED_ROWS = 24
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
TINY = {torch.float32: 1e-7, torch.float16: 1e-6, torch.bfloat16: 1e-5}  # error taken as equal


def inputs(heads: int, dtype: torch.dtype):
    """Q, k, v of `heads` heads, cut out of 12 as a cache's slices are."""
    generator = torch.Generator().manual_seed(0)

    def draw(frames):
        x = torch.randn(1, frames * FRAME_TOKENS, HEADS, DIM, generator=generator)
        return x.to(dtype)[:, :, :heads]

    return draw(Q_FRAMES), draw(K_FRAMES), draw(K_FRAMES)


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def float64_rows(q, k, v, rows, kept=None):
    """Attention of `rows` in float64; `kept` is [B, H, rows, Lk], True where attended."""
    q, k, v = (x.transpose(1, 2).double() for x in (q[:, rows], k, v))
    logits = q @ k.transpose(-1, -2) * DIM**-0.5
    if kept is not None:
        logits = logits.masked_fill(~kept, -torch.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2)


def kept_keys(blocks, rows):
    """The list of each of `rows` as a mask over keys, [B, H, rows, Lk]."""
    token = torch.arange(FRAME_TOKENS) // blocks.block_k
    per_frame = int(token[-1]) + 1
    block = (torch.arange(K_FRAMES)[:, None] * per_frame + token).flatten()
    return torch.as_tensor(blocks.to_bool())[:, :, rows // blocks.block_q][..., block]


def kept_pairs(blocks):
    """(query, key) pairs that the lists hold, over all heads."""
    rows = torch.arange(blocks.q_len)
    sizes = torch.bincount(rows // blocks.block_q)  # queries of each query block
    tokens = torch.arange(FRAME_TOKENS) // blocks.block_k
    widths = torch.bincount(tokens).repeat(K_FRAMES)  # keys of each key block
    flags = torch.as_tensor(blocks.to_bool()).double()
    return int((flags @ widths.double() @ sizes.double()).sum())


class Row:
    """A line of the table: what runs, and the pairs it attends."""

    def __init__(self, name, run, pairs, truth=None):
        self.name, self.run, self.pairs, self.truth = name, run, pairs, truth
        self.seconds: list[float] = []


def rows_of(q, k, v, rows):
    heads = q.shape[2]
    every = heads * q.shape[1] * k.shape[1]
    dense = float64_rows(q, k, v, rows)
    table = [
        Row("torch SDPA", lambda: sdpa(q, k, v), every, dense),
        Row("ours, dense", lambda: lf.block_sparse_attention(q, k, v), every, dense),
    ]
    for score, hierarchy in (("mean", True), ("mass", False)):
        asked = dict(frame_tokens=FRAME_TOKENS, sparsity=SPARSITY, score=score, hierarchy=hierarchy)
        blocks = lf.select_blocks(q, k, **asked)
        pairs = kept_pairs(blocks)
        truth = float64_rows(q, k, v, rows, kept_keys(blocks, rows))
        table += [
            Row(f"{score}: select", lambda asked=asked: lf.select_blocks(q, k, **asked), 0),
            Row(
                f"{score}: attend",
                lambda blocks=blocks: lf.block_sparse_attention(q, k, v, blocks),
                pairs,
                truth,
            ),
            Row(
                f"{score}: select + attend",
                lambda asked=asked: lf.attention(q, k, v, **asked),
                pairs,
                truth,
            ),
        ]
    return table


def check(table, rows):
    """The largest error of each result on the sampled rows; torch's own sets the bound."""
    errors = {}
    for row in table:
        if row.truth is not None:
            got = row.run()[:, rows].double()
            errors[row.name] = ((got - row.truth).abs().max() / row.truth.abs().max()).item()
    return errors


def measure(table, rounds, clock):
    for turn in range(rounds + 1):
        for row in table:
            start = clock()
            row.run()
            if turn > 0:  # the first round warms up
                row.seconds.append(clock() - start)


def summary(table, errors):
    torch_seconds, dense_seconds = (np.array(row.seconds) for row in table[:2])
    lines = []
    for row in table:
        seconds = np.array(row.seconds)
        low, middle, high = np.percentile(seconds, [10, 50, 90])
        lines.append(
            {
                "row": row.name,
                "median_ms": middle * 1e3,
                "p10_ms": low * 1e3,
                "p90_ms": high * 1e3,
                "gflops": 4 * DIM * row.pairs / middle / 1e9 if row.pairs else None,
                "times_torch": float(np.median(torch_seconds / seconds)),
                "times_dense": float(np.median(dense_seconds / seconds)),
                "error": errors.get(row.name),
            }
        )
    return lines


def show(lines):
    print(
        f"{'':24}{'median':>10}{'p10 - p90':>20}{'GFLOP/s':>9}{'x torch':>9}{'x dense':>9}  error"
    )
    for line in lines:
        gflops = f"{line['gflops']:9.1f}" if line["gflops"] else " " * 9
        spread = f"{line['p10_ms']:.1f} - {line['p90_ms']:.1f}"
        error = f"  {line['error']:.1e}" if line["error"] is not None else ""
        print(
            f"{line['row']:24}{line['median_ms']:7.1f} ms{spread:>20}{gflops}"
            f"{line['times_torch']:9.2f}{line['times_dense']:9.2f}{error}"
        )


def cpu_name():
    try:
        text = Path("/proc/cpuinfo").read_text()
        return next(x.split(":")[1].strip() for x in text.splitlines() if x[:10] == "model name")
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit():
    here = Path(__file__).parent
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True
        )
        return run.stdout.strip() or None
    except OSError:
        return None


def facts():
    info = lf.info()
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": info["threads"],
        "isa": info["isa"],
        "load_at_start": os.getloadavg()[0],
        "lightforcing": lf.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "sparsity": SPARSITY,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--heads", type=count, default=2, help="heads to run, 1 to 12 (default 2)")
    parser.add_argument("--full", action="store_true", help="all 12 heads: several minutes")
    parser.add_argument("--rounds", type=count, default=7, help="timed rounds (default 7)")
    parser.add_argument(
        "--threads", type=number(int, 0, 1024), default=0, help="0: the default of each library"
    )
    parser.add_argument(
        "--dtype", action="append", choices=["float32", "float16", "bfloat16"], default=None,
        help="may be given twice; default float32 and bfloat16",
    )  # fmt: skip
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="see above")
    parser.add_argument("--json", type=new_file, help="write everything here")
    args = parser.parse_args()
    heads = HEADS if args.full else args.heads
    if not 1 <= heads <= HEADS:
        parser.error(f"--heads: expected 1 to {HEADS}, got {heads}")
    if args.threads:
        torch.set_num_threads(args.threads)
        lf.set_num_threads(args.threads)

    record = {**facts(), "heads": heads, "rounds": args.rounds, "clock": args.clock, "tables": {}}
    print(
        "{cpu}, {cores} cores, load {load_at_start:.1f}, {clock} clock; {threads} threads, {isa}; "
        "lightforcing {lightforcing} ({commit}), torch {torch}, Python {python}".format(**record)
    )
    print(
        f"{heads} of {HEADS} heads, {Q_FRAMES * FRAME_TOKENS} queries x {K_FRAMES * FRAME_TOKENS} "
        f"keys, D {DIM}; sparse rows keep {1 - SPARSITY:.0%} of the key blocks of 64"
    )
    failed = False
    generator = torch.Generator().manual_seed(1)
    sampled = torch.randperm(Q_FRAMES * FRAME_TOKENS, generator=generator)[:SAMPLED_ROWS]
    for name in args.dtype or ["float32", "bfloat16"]:
        dtype = getattr(torch, name)
        table = rows_of(*inputs(heads, dtype), sampled)
        errors = check(table, sampled)
        measure(table, args.rounds, CLOCKS[args.clock])
        lines = summary(table, errors)
        print(f"\n{name}")
        show(lines)
        record["tables"][name] = lines
        bound = 2 * errors["torch SDPA"] + TINY[dtype]
        for row, error in errors.items():
            if not error <= bound:
                print(f"{row}: error {error:.1e} is above {bound:.1e}")
                failed = True
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
