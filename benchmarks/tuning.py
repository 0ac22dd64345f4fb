"""Does tuning close the gap? The world model tuned briefly under each rule, then examined under it.

    python benchmarks/tuning.py [--rules "mass count" "hsa cag" ...] [--also "mass cag" ...]
                                [--seconds 60] [--limit N] [--clips N] [--weights FOLDER]
                                [--out FOLDER] [--results PREFIX]

Sparse attention is published with weights that were tuned for it. Here each rule starts from the
same weights and tunes for as many steps on the same clips, its attention masked by the lists that
the rule chooses for the queries and keys of the moment; a dense arm of the same length is the
control. The first rule has --seconds, the others as many steps as it took (--clock gives each the
same time instead). Then every tuned model continues the exam clips under every rule, and under
those of --also, that nothing was tuned for. Blocks are those of the quality table (64 px, 16
tokens); no list has a gradient, what it keeps has.

In training the attention is plain torch under a mask, much slower than the kernels: it is about
what is learned, not about speed. A rule that is done is kept in --out, and not tuned again at the
same commit with the same weights and settings. The results are written anew after every rule, and
none is begun that would not end within --limit: exit status 3 if one was left out, 1 if one failed.
On a CPU a step of 16 clips takes minutes: --steps 2 --step-clips 1 --clips 1 tries it out.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import _here  # noqa: F401
import torch
import torch.nn.functional as F
from _arguments import count, device, duration, new_file, new_folder, number, seed
from _paired import Store, difference, digest, interval, show
from _rules import TABLES, rows
from quality import Exam, facts
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightforcing import selectors
from lightforcing.selectors import Geometry
from lightforcing.world.data import CHUNK, EXAM_SEED, clips
from lightforcing.world.layout import Layout
from lightforcing.world.muon import Muon

RULES, ALSO = ("mass count", "hsa cag", "dense"), ("mass cag",)
FIRST = 1 << 40  # seeds of the clips to tune on; training takes smaller ones, exams larger ones
RATE, WARM_UP, DECAY, EMA = 0.004, 10, 0.4, 0.98  # a fifth of the training's rate
NO_TIME, UNTUNED, REGIONS = "no time left", "untuned", ("bare", "back", "all")
STOCK = 8  # steps whose clips are made at once: 600 small launches take 24 ms
MATRICES = ("self_attn.q.", "self_attn.k.", "self_attn.v.", "self_attn.o.", "ffn.0.", "ffn.2.")


def masked(layout, table, row):
    """Attention of a training sequence in which every chunk after the first keeps what a rule says.

    Args:
        layout: who sees whom; a ``lightforcing.world.layout.Layout`` of one clip.
        table: block sizes.
        row: the rule; None attends to all that is seen.

    Returns:
        A function of q, k, v ``[B, L, H, D]`` with gradients.
    """
    config = row.config(table)
    if config is None:
        return _with(SDPBackend.FLASH_ATTENTION, layout.split(table.frame_tokens))
    chosen = config.selector or selectors.make("hsa" if config.hierarchy else config.score)
    runs = [r.nonzero().flatten().tolist() for r in layout.sees.cpu()]
    chunks, tokens = layout.chunk.tolist(), table.frame_tokens

    @torch.no_grad()
    def mask_of(q, k, geometry):
        with torch.autocast(q.device.type, enabled=False):  # scores as a rollout computes them
            return kept_tokens(chosen.select(q.detach(), k.detach(), geometry), q.dtype)

    def attend(q, k, v):
        q, k, v = (x.split(CHUNK * tokens, 1) for x in (q, k, v))
        parts = []
        for i, run in enumerate(runs):
            keys, values = (torch.cat([x[j] for j in run], 1) for x in (k, v))
            kept = row.kept[chunks[i] - 1] if chunks[i] else 0
            mask = None
            if kept:
                geometry = Geometry(
                    tokens, CHUNK, CHUNK * len(run), kept, config.block_q, config.block_k,
                    (table.view // 4,) * 2, "morton", chunk=chunks[i] + 1,
                )  # fmt: skip
                mask = mask_of(q[i], keys, geometry)
            heads = (x.transpose(1, 2) for x in (q[i], keys, values))
            parts.append(F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2))
        return torch.cat(parts, 1)

    return _with(SDPBackend.EFFICIENT_ATTENTION, attend)  # the fast one that takes a mask


def _with(backend, attend):
    """The same attention; a GPU by this kernel alone: cuDNN would plan anew for every length."""

    def by_it(q, k, v):
        with sdpa_kernel(backend) if q.is_cuda else nullcontext():
            return attend(q, k, v)

    return by_it


def kept_tokens(lists, dtype):
    """A list of blocks that fill their frames, added to logits: 0 or -inf, ``[B, H, Lq, Lk]``."""
    shape = (*lists.indices.shape[:3], lists.blocks)
    kept = torch.full(shape, -math.inf, dtype=dtype, device=lists.indices.device)
    kept.scatter_(3, lists.indices.long(), 0.0)
    tokens = kept[:, :, :, None, :, None].expand(-1, -1, -1, lists.block_q, -1, lists.block_k)
    return tokens.reshape(*shape[:2], shape[2] * lists.block_q, shape[3] * lists.block_k)


def tune(model, table, row, *, seconds, steps=10**9, batch=16, part=None, seed=0, report=None):
    """A copy of the model, tuned under a rule by the clock or by steps: (averaged weights, steps).

    Args:
        model: a world model in float32.
        table: block sizes and resolution.
        row: a ``_rules.Row``.
        seconds: of the clock.
        steps: at most so many.
        batch: clips a step.
        part: clips of a forward and backward, whose gradients are summed; None is the batch.
            Halved where the memory does not suffice: 16 clips take 50 GB, most of it masks.
        seed: of the noise; clips are the same for every rule.
        report: called with a line now and then.

    Raises:
        RuntimeError: the loss is no longer finite.
    """
    tuned = copy.deepcopy(model).requires_grad_(True)
    average = copy.deepcopy(model)
    device = model.device
    matrices = [w for n, w in tuned.named_parameters()
                if n.endswith("weight") and any(m in n for m in MATRICES)]  # fmt: skip
    ids = {id(w) for w in matrices}
    rest = [w for w in tuned.parameters() if id(w) not in ids]
    muon, adam = Muon(matrices, 0.0), torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.95))
    layout = Layout(7, 1, device)
    attend = masked(layout, table, row)
    draw = torch.Generator(device).manual_seed(seed)
    begin, step, part = time.perf_counter(), 0, part or batch
    ahead = STOCK if device.type == "cuda" else 1
    while step < steps and time.perf_counter() - begin < seconds:
        done = max((time.perf_counter() - begin) / seconds, step / steps)
        rate = RATE * min(1.0, (step + 1) / WARM_UP) * min(1.0, (1 - done) / DECAY)
        muon.lr = rate
        adam.param_groups[0]["lr"] = rate / 20
        if step % ahead == 0:
            first = FIRST + step * batch
            seeds = range(first, first + ahead * batch)
            stock = clips(seeds, view=table.view, exam=False, device=device)
        clip = stock[step % ahead * batch :][:batch]
        sequence = layout.batch(clip, draw)
        while True:
            try:
                loss = _gradients(tuned, layout, attend, sequence, part)
                break
            except torch.OutOfMemoryError:
                if part == 1:
                    raise
                part = part // 2
                tuned.zero_grad(set_to_none=True)
        torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
        muon.step()
        adam.step()
        tuned.zero_grad(set_to_none=True)
        keep = min(EMA, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(tuned.parameters()), 1 - keep)
        step += 1
        if step % 20 == 1:
            loss = loss.item()
            if not math.isfinite(loss):
                raise RuntimeError(f"loss: expected a finite number, got {loss} at step {step}")
            if report is not None:
                report(f"{row.name}: step {step}, loss {loss:.4f}")
    if device.type == "cuda":
        torch.cuda.synchronize()
    return average.requires_grad_(False).eval(), step


def _gradients(model, layout, attend, sequence, part):
    """Adds up the gradients of a step's parts; the loss."""
    x, t, told, target = sequence
    total, cuda = 0.0, x.device.type == "cuda"
    for start in range(0, len(x), part):
        these = slice(start, start + part)
        more = {name: value[these] for name, value in told.items()}
        with torch.autocast(x.device.type, torch.bfloat16, enabled=cuda):
            v = model.forward_frames(
                x[these], t[these], positions=layout.positions, attend=attend, **more
            )
        v = v[:, :, layout.noisy_frames].float()
        loss = F.mse_loss(v, target[these]) * (len(v) / len(x))
        loss.backward()
        total += loss.detach()
    return total


def run(model, table, arms, exam_clips, args, report, store=None, also=(), done=None):
    """Tune every arm, and examine it under every rule.

    Args:
        model: a world model in float32.
        table: block sizes and resolution.
        arms: ``_rules.Row``s; the first one's steps hold for the others unless ``args.clock``.
        exam_clips: to examine with.
        args: of :func:`main`.
        report: called with a line now and then.
        store: a ``_paired.Store`` of finished arms; None keeps them in memory only.
        also: ``_rules.Row``s to examine under, beside the arms.
        done: called with what was found so far after every arm.

    Returns:
        ({rule: ``steps``, ``seconds``, ``memory_gb`` and ``scores`` by the rule it runs under},
        {rule: why it is missing}). The model before tuning is the rule ``untuned``, of no steps.
    """
    device = model.device
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    under = {row.name: row for row in (*arms, *also)}
    found, missing, begin, slowest = {}, {}, time.perf_counter(), 0.0

    def scores(weights):
        weights, out = copy.deepcopy(weights).to(dtype), {}
        for name, row in under.items():
            exam = Exam(weights, exam_clips, table, args.batch, args.seed)
            out[name] = exam.run(row)["scores"]
        return out

    def arm(row):
        if row is None:
            return dict(steps=0, seconds=0.0, memory_gb=0.0, scores=scores(model))
        tuned = [one for name, one in found.items() if name != UNTUNED]
        limit = args.seconds if args.clock or not tuned else float("inf")
        steps = args.steps if args.clock or not tuned else tuned[0]["steps"]
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        weights, took = tune(
            model, table, row, seconds=limit, steps=steps, batch=args.step_clips,
            seed=args.seed, report=report,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
        report(f"{row.name}: {took} steps in {seconds:.1f} s")
        return dict(steps=took, seconds=round(seconds, 1), memory_gb=round(memory, 1),
                    scores=scores(weights))  # fmt: skip

    for name, row in {UNTUNED: None, **{row.name: row for row in arms}}.items():
        made, start = None if store is None else store.get(name), time.perf_counter()
        if made is None:
            guess = slowest if row is None or row.selector else slowest / 2  # dense has no masks
            if start - begin + guess > args.limit:
                missing[name] = NO_TIME
                report(f"{name}: {NO_TIME}")
                continue
            try:
                made = arm(row)
            except RuntimeError as error:  # memory, or a loss that is not finite
                missing[name] = f"{type(error).__name__}: {error}"
                report(f"{name}: {missing[name]}")
                continue
            if store is not None:
                made = store.put(name, **made)
            slowest = max(slowest, time.perf_counter() - start)
        found[name] = made
        if done is not None:
            done(found, missing)
    return found, missing


def text(found):
    """Lines: each rule before and after its tuning, and every tuned model under every rule."""
    lines = [f"{'tuned, run under':16}{'steps':>6}  {'region':8}{'untuned':>9}{'tuned':>8}  "
             f"{'gained [95 %]':24}{'- dense, untuned':24}{'- dense, both tuned':24}"
             "gap closed"]  # fmt: skip
    before = found[UNTUNED]["scores"]
    arms = {name: arm for name, arm in found.items() if name != UNTUNED}
    own = {name: arm["scores"][name] for name, arm in arms.items()}
    for name, arm in arms.items():
        for region in REGIONS:
            pair = before[name][region], own[name][region]
            cells = "".join(_mean(x, w) for x, w in zip(pair, (9, 8), strict=True))
            cells += f"  {show(difference(*pair[::-1])):24}"
            if "dense" in own and name != "dense":
                dense = before["dense"][region], own["dense"][region]
                gaps = [_less(x, y) for x, y in zip(pair, dense, strict=True)]
                cells += "".join(f"{show(interval(gap)):24}" for gap in gaps)
                cells += show(difference(*gaps[::-1]))
            head = f"{name:16}{arm['steps']:>6}" if region == REGIONS[0] else " " * 22
            lines.append(f"{head}  {region:8}{cells}".rstrip())
        right = [f"{k} {_share(x['glyph_easy'])} {_share(x['glyph_hard'])}"
                 for k, x in (("untuned", before[name]), ("tuned", own[name]))]  # fmt: skip
        lines.append(f"{'':24}glyphs {', '.join(right)}")
    columns = list(before)
    for region in (*REGIONS, "glyph_hard"):
        unit = "share right" if region.startswith("glyph") else "dB"
        lines += ["", f"{region}, {unit}: tuned under a rule (lines), run under another (columns)"]
        lines.append(f"{'':16}" + "".join(f"{name:>14}" for name in columns))
        for name, arm in found.items():
            cells = "".join(_mean(arm["scores"][other][region]) for other in columns)
            lines.append(f"{name:16}{cells}")
    lines += ["", "paired differences, 95 % over clips"]
    lines.append(f"{'':58}" + "".join(f"{n:24}" for n in REGIONS).rstrip())

    def line(label, one, two):
        cells = [show(difference(one[n], two[n])) for n in REGIONS]
        lines.append(f"{label:58}" + "".join(f"{c:24}" for c in cells).rstrip())

    sparse = [n for n in columns if n != "dense"]
    for a, b in ((a, b) for i, a in enumerate(sparse) for b in sparse[i + 1 :]):
        if a in own and b in own:
            line(f"{a} - {b}, each tuned for itself", own[a], own[b])
        for name, arm in found.items():
            label = f"tuned under {name}" if name in arms else name
            line(f"{label}: {a} - {b}", arm["scores"][a], arm["scores"][b])
    return lines


def _less(a, b):
    """Clip by clip."""
    return [x - y for x, y in zip(a, b, strict=True)]


def _mean(values, width=14):
    mean = interval(values)[0]
    return "-".rjust(width) if mean is None else f"{mean:{width}.2f}"


def _share(values):
    return f"{sum(values) / len(values):.2f}"


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--rules", nargs="+", default=RULES, metavar="NAME", help="slowest first")
    parser.add_argument(
        "--also", nargs="*", default=ALSO, metavar="NAME", help="only run under; default: mass cag"
    )
    parser.add_argument(
        "--seconds", type=duration, default=60, help="of the first rule; default: 60"
    )
    parser.add_argument(
        "--limit", type=duration, default=1e9, help="seconds of all: begin no rule that ends later"
    )
    parser.add_argument("--clock", action="store_true", help="seconds for each rule, not its steps")
    parser.add_argument(
        "--steps", type=number(int, 1, 10**9), default=10**9, help="at most so many"
    )
    parser.add_argument("--step-clips", type=count, default=16, help="clips a step; default: 16")
    parser.add_argument("--clips", type=count, default=128, help="to examine; default: 128")
    parser.add_argument("--batch", type=count, default=64, help="clips of a rollout; default: 64")
    parser.add_argument("--weights", type=Path, help="folder of an export; default: the package's")
    parser.add_argument(
        "--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--commit", help="where there is no git; default: LIGHTFORCING_COMMIT")
    parser.add_argument(
        "--out", type=new_folder, default=Path("build/quality"), help="finished rules"
    )
    parser.add_argument(
        "--results", type=new_file, metavar="PREFIX", help="write PREFIX.json and .txt"
    )
    args = parser.parse_args(argv)
    from lightforcing import world

    begin, table = time.perf_counter(), TABLES[64]
    every = {r.name: r for r in rows(table, selectors.names())}
    for option in ("rules", "also"):
        if unknown := [n for n in getattr(args, option) if n not in every]:
            parser.error(f"--{option}: no rule {', '.join(unknown)}; there are {', '.join(every)}")
    args.rules = list(dict.fromkeys(args.rules))
    args.also = [n for n in dict.fromkeys(args.also) if n not in args.rules]

    def report(line):
        print(f"{time.perf_counter() - begin:6.1f} s  {line}", flush=True)

    try:
        model = world.load_world(args.weights, device=args.device, dtype=torch.float32)
    except (ValueError, OSError) as error:
        parser.error(f"--weights: {error}")
    exam_clips = clips(range(EXAM_SEED, EXAM_SEED + args.clips), device=args.device)
    settings = ("also", "seconds", "clock", "steps", "step_clips", "clips", "seed")
    key = facts(args) | {"weights": digest(model), "rules": args.rules}
    key |= {n: getattr(args, n) for n in settings}
    store = Store(args.out / "tuning.jsonl", key)

    def written(found, missing):
        head = [
            "{device}; commit {commit}, weights {weights}, torch {torch}".format(**key),
            f"64 px, {args.clips} clips, {args.step_clips} clips a step; seconds of tuning and GB: "
            + ", ".join(f"{name} {arm['seconds']:.0f} {arm['memory_gb']:.0f}"
                        for name, arm in found.items() if name != UNTUNED),
            *(f"missing: {name}, {why}" for name, why in missing.items()),
            "",
        ]  # fmt: skip
        shown = "\n".join(head + (text(found) if UNTUNED in found else []))
        if args.results:
            args.results.parent.mkdir(parents=True, exist_ok=True)
            record = {"facts": store.key, "rules": found, "missing": missing}
            args.results.with_suffix(".json").write_text(json.dumps(record) + "\n")
            args.results.with_suffix(".txt").write_text(shown + "\n")
        return shown

    args.limit -= time.perf_counter() - begin
    arms, also = ([every[n] for n in names] for names in (args.rules, args.also))
    found, missing = run(model, table, arms, exam_clips, args, report, store, also, written)
    print(written(found, missing))
    failed = [why for why in missing.values() if why != NO_TIME]
    return 1 if failed else 3 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
