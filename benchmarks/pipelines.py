"""Run the real chunk loops of real checkouts dense, patched and unpatched, small, on the CPU.

    python benchmarks/pipelines.py PATH [PATH ...] [--preset paper --preset fast] [--json FILE]

PATH is a checkout of Self Forcing, LongLive, or any code base with the same contract; nothing of
it is changed (its files are hashed before and after) and nothing is downloaded. Each of its chunk
loops runs with random weights: dense; with `sparsity=0`, which must give the same latents bit by
bit; with every preset, where exactly the calls that the method's rule names must be sparse; and
unpatched, which must give the dense latents and the original objects back. Then: deep copies, two
rollouts in turn through one patched model, LoRA (if peft is installed), two checkouts at once.
The exit status is 1 if a check fails. Weights are random: the distances to dense say how much the
sparse calls change, nothing about the quality of pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys

import _here  # noqa: F401
import torch
from _arguments import count, folder, new_file, number, pattern
from _build import Rollout, fitting
from _case import run_case
from _checkout import Checkout
from _entries import Size, recognise, variants
from _special import copied, interleaved, lora, pooled_anew, two_checkouts

import lightforcing as lf

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def arguments(argv):
    """Parse the command line."""
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("paths", type=folder, nargs="+", metavar="PATH", help="folder of a checkout")
    p.add_argument("--layers", type=count, default=2)
    p.add_argument("--dim", type=count, default=256)
    p.add_argument("--heads", type=count, default=2)
    p.add_argument(
        "--height", type=count, default=16, help="of the latents; a frame is h*w/4 tokens"
    )
    p.add_argument("--width", type=count, default=26)
    p.add_argument("--chunks", type=count, default=7)
    p.add_argument("--dtype", choices=DTYPES, default="bf16")
    p.add_argument(
        "--preset",
        action="append",
        choices=lf.PRESETS,
        help="may be repeated; default: paper balanced fast",
    )
    p.add_argument(
        "--threads",
        type=number(int, 0, 1024),
        default=0,
        help="of torch and of lightforcing; 0: theirs",
    )
    p.add_argument(
        "--only", type=pattern, default="", help="regular expression that names of cases match"
    )
    p.add_argument("--no-special", action="store_true", help="skip copies, turns and LoRA")
    p.add_argument("--json", type=new_file, metavar="FILE", help="write everything there as well")
    return p.parse_args(argv)


def environment():
    """What the figures depend on, without names of folders."""
    info = lf.info()
    return {
        "lightforcing": lf.__version__,
        "isa": info.get("isa"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "torch_threads": torch.get_num_threads(),
        "lightforcing_threads": info.get("threads"),
        "load_before": round(os.getloadavg()[0], 1),
        "cores": os.cpu_count(),
    }


def special(rollout, with_lora):
    """Run what a patch must survive on one case."""
    runs = (interleaved, pooled_anew, copied)
    checks = [row for run in runs for row in run(rollout).rows]
    if with_lora:
        found = lora(rollout)
        checks += found.rows if found else []
    return checks


def run_checkout(checkout, options, size, presets):
    """Run all loops of one checkout; returns its results and the first rollout."""
    before = checkout.fingerprint()
    entries, left = recognise(checkout)
    results, first = [], None
    print(f"\n{'=' * 100}\n{checkout.name} at {checkout.commit() or 'no known commit'}: "
          f"{len(before)} files, {len(entries)} chunk loops")  # fmt: skip
    for entry in sorted(entries, key=lambda e: e.kind == "sampler"):
        for variant in variants(checkout, entry):
            if not re.search(options.only, f"{checkout.name} {entry} {variant.label}"):
                continue
            rollout = Rollout(checkout, entry, variant, fitting(checkout, entry, size))
            result = run_case(rollout, presets)
            if not options.no_special and entry.kind != "sampler":
                result["checks"] += special(rollout, with_lora=first is None)
            first = first or rollout
            show(result, presets)
            results.append(result)
    print(f"\n{checkout.name}: stand-ins and settings:")
    for what, reason in sorted(checkout.standins.items()):
        print(f"  {what}: {reason}")
    if left:
        print("loops not driven:\n" + "\n".join(f"  {line}" for line in left))
    found = {"name": checkout.name, "commit": checkout.commit(), "hashes": before,
             "standins": checkout.standins, "not_driven": left,
             "cases": results}  # fmt: skip
    return found, first


def show(result, presets):
    """Print one case: calls by chunk, runs, checks that fail."""
    r = result
    print(f"\n-- {r['entry']}: {r['variant']}\n   {r['model']}, {r['layers']} layers, {r['heads']} "
          f"heads of {r['head_dim']}, {r['dtype']}, {r['frame_tokens']} tokens a frame, "
          f"{r['frames']} frames")  # fmt: skip
    head = f"   {'chunk':>5} {'first':>5} {'q':>3} {'K':>3} {'calls':>5} {'dense':>8}"
    print(head + "".join(f" | {p + ' sparse':>15} {'density':>7} {'cpu s':>6}" for p in presets))
    for row in r["chunks"]:
        line = f"   {row['chunk']:>5} {row['first']:>5} {row['query']:>3} {row['keys']:>3} "
        line += f"{row['calls']:>5} {row['dense_cpu_seconds']:>8.2f}"
        for p in presets:
            cell = row[p]
            line += f" | {cell['sparse']:>15} {cell['density']:>7.3f} {cell['cpu_seconds']:>6.2f}"
        print(line)
    print(f"   {'run':<12} {'seconds':>8} {'cpu s':>6} {'rel L2':>9} {'calls':>5} {'sparse':>6} "
          f"{'expected':>8} {'density':>7}  dense calls by reason")  # fmt: skip
    for run in r["runs"]:
        near, density = run.get("rel_l2"), run.get("density")
        near = "-" if near is None else f"{near:.2e}"
        reasons = ", ".join(f"{n} {reason}" for reason, n in run.get("dense_calls", {}).items())
        raised = run.get("keep_frames")
        if raised:
            reasons += f"; keep_frames raised, by chunk: {raised}"
        print(f"   {run['run']:<12} {run['seconds']:>8.2f} {run['cpu_seconds']:>6.2f} {near:>9} "
              f"{run['calls']:>5} {run['sparse']:>6} {run.get('expected', 0):>8} "
              f"{1 if density is None else density:>7.3f}  {reasons}")  # fmt: skip
    failed = [c for c in r["checks"] if not c["holds"]]
    print(f"   checks: {len(r['checks']) - len(failed)} hold, {len(failed)} fail")
    for check in failed:
        print(f"   FAILS: {check['claim']} ({check['detail']})")
    sys.stdout.flush()


def main(argv=None):
    """Run every checkout; returns the exit status."""
    options = arguments(argv)
    presets = options.preset or ["paper", "balanced", "fast"]
    if options.threads:
        torch.set_num_threads(options.threads)
        lf.set_num_threads(options.threads)
    names = ("layers", "dim", "heads", "height", "width", "chunks")
    dtype = DTYPES[options.dtype]
    size = Size(**{n: getattr(options, n) for n in names}, dtype=dtype, text_len=64)
    facts = environment()
    print(", ".join(f"{k} {v}" for k, v in facts.items()))
    checkouts, rollouts, extra = [], [], []
    for path in options.paths:
        found, rollout = run_checkout(Checkout(path), options, size, presets)
        checkouts.append(found)
        if rollout is not None:
            rollouts.append(rollout)
    if len(rollouts) > 1 and not options.no_special:
        for one, other in zip(rollouts, rollouts[1:], strict=False):
            extra += two_checkouts(one, other).rows
        print("\ntwo checkouts in one process:")
        for check in extra:
            print(f"  {'holds' if check['holds'] else 'FAILS'}: {check['claim']} {check['detail']}")
    checks = extra + [c for found in checkouts for case in found["cases"] for c in case["checks"]]
    failed = sum(not c["holds"] for c in checks)
    print()
    for path, found in zip(options.paths, checkouts, strict=True):
        before = found.pop("hashes")
        found["files"], found["unchanged"] = len(before), Checkout(path).fingerprint() == before
        failed += not found["unchanged"]
        outcome = "unchanged" if found["unchanged"] else "CHANGED"
        print(f"{found['name']}: {len(before)} files hashed before and after, {outcome}")
    print(f"{len(checks)} checks in {sum(len(f['cases']) for f in checkouts)} cases, {failed} fail")
    if options.json:
        settings = {k: v for k, v in vars(options).items() if k not in ("paths", "json")}
        document = {"environment": facts, "settings": settings, "checkouts": checkouts,
                    "two_checkouts": extra}  # fmt: skip
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if failed or not checks else 0


if __name__ == "__main__":
    sys.exit(main())
