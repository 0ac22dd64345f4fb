"""Does tuning close the gap? The world model tuned briefly under each rule, then examined under it.

    python benchmarks/tuning.py [--rules "hsa cag" "mass count" ...] [--seconds 60] [--clips N]
                                [--weights FOLDER] [--out FOLDER] [--results FILE]

Sparse attention is published with weights that were tuned for it. Here each rule starts from the
same weights and tunes for the same time on the same clips, its attention masked by the lists that
the rule chooses for the queries and keys of the moment; a dense arm of the same length is the
control. Then every tuned model continues the exam clips under its own rule and dense. Blocks are
those of the quality table (64 px, 16 tokens); no list has a gradient, what it keeps has.

In training the attention is plain torch under a mask, much slower than the kernels: it is about
what is learned, not about speed.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from _paired import difference, interval, show
from _rules import TABLES, Row, rows
from quality import Exam, facts

from lightforcing import selectors
from lightforcing.selectors import Geometry
from lightforcing.world.data import CHUNK, EXAM_SEED, clips
from lightforcing.world.layout import Layout
from lightforcing.world.muon import Muon

RULES = ("dense", "mean uniform", "mean cag", "hsa cag", "mass count")
FIRST = 1 << 40  # seeds of the clips to tune on; training takes smaller ones, exams larger ones
RATE, WARM_UP, DECAY, EMA = 0.004, 10, 0.4, 0.98  # a fifth of the training's rate
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
        return layout.split(table.frame_tokens)
    chosen = config.selector or selectors.make("hsa" if config.hierarchy else config.score)
    runs = [r.nonzero().flatten().tolist() for r in layout.sees.cpu()]
    chunks, tokens = layout.chunk.tolist(), table.frame_tokens

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
                lists = chosen.select(q[i].detach(), keys.detach(), geometry)
                mask = kept_tokens(lists)
            heads = (x.transpose(1, 2) for x in (q[i], keys, values))
            parts.append(F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2))
        return torch.cat(parts, 1)

    return attend


def kept_tokens(lists):
    """A list of blocks that fill their frames as a mask over tokens, ``[B, H, Lq, Lk]``."""
    shape = (*lists.indices.shape[:3], lists.blocks)
    kept = torch.zeros(shape, dtype=torch.bool, device=lists.indices.device)
    kept.scatter_(3, lists.indices.long(), True)
    return kept.repeat_interleave(lists.block_q, 2).repeat_interleave(lists.block_k, 3)


def tune(model, table, row, *, seconds, steps=10**9, batch=16, seed=0, report=None):
    """A copy of the model, tuned under a rule by the clock or by steps: (averaged weights, steps).

    Args:
        model: a world model in float32.
        table: block sizes and resolution.
        row: a ``_rules.Row``.
        seconds: of the clock.
        steps: at most so many.
        batch: clips a step.
        seed: of the noise; clips are the same for every rule.
        report: called with a line now and then.
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
    begin, step = time.perf_counter(), 0
    while step < steps and time.perf_counter() - begin < seconds:
        done = max((time.perf_counter() - begin) / seconds, step / steps)
        rate = RATE * min(1.0, (step + 1) / WARM_UP) * min(1.0, (1 - done) / DECAY)
        muon.lr = rate
        adam.param_groups[0]["lr"] = rate / 20
        first = FIRST + step * batch
        clip = clips(range(first, first + batch), view=table.view, exam=False, device=device)
        x, t, told, target = layout.batch(clip, draw)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            v = tuned.forward_frames(x, t, positions=layout.positions, attend=attend, **told)
        loss = F.mse_loss(v[:, :, layout.noisy_frames].float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
        muon.step()
        adam.step()
        tuned.zero_grad(set_to_none=True)
        keep = min(EMA, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(tuned.parameters()), 1 - keep)
        step += 1
        if report is not None and step % 20 == 1:
            report(f"{row.name}: step {step}, loss {loss.item():.4f}")
    return average.requires_grad_(False).eval(), step


def run(model, table, arms, exam_clips, args, report):
    """Tune and examine every arm; a dict a rule with its scores under its own rule and dense."""
    device = model.device
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    found = {}

    def scores(weights, row):
        exam = Exam(copy.deepcopy(weights).to(dtype), exam_clips, table, args.batch, args.seed)
        return exam.run(row)["scores"]

    dense = Row("dense")
    for row in arms:
        before = scores(model, row)
        tuned, steps = tune(
            model, table, row, seconds=args.seconds, steps=args.steps, batch=args.step_clips,
            seed=args.seed, report=report,
        )  # fmt: skip
        after = scores(tuned, row)
        found[row.name] = {
            "steps": steps,
            "before": before,
            "after": after,
            "after_dense": after if row.selector is None else scores(tuned, dense),
        }
        report(f"{row.name}: {steps} steps")
    return found


def text(found):
    """Lines: each rule before and after its tuning, and against dense tuned for the same time."""
    lines = [f"{'rule':16}{'steps':>6}  {'region':8}{'untuned':>9}{'tuned':>8}  "
             f"{'gained [95 %]':24}{'- dense, untuned':24}{'- dense, both tuned':24}"]  # fmt: skip
    control = found.get("dense")
    for name, arm in found.items():
        for region in ("bare", "back", "all"):
            before, after = (arm[k][region] for k in ("before", "after"))
            means = [interval(x)[0] for x in (before, after)]
            cells = "".join("-".rjust(w) if m is None else f"{m:{w}.2f}"
                            for m, w in zip(means, (9, 8), strict=True))  # fmt: skip
            against = ["", ""]
            if control is not None and arm is not control:
                against = [show(difference(arm[k][region], control[k][region]))
                           for k in ("before", "after")]  # fmt: skip
            head = f"{name:16}{arm['steps']:>6}" if region == "bare" else " " * 22
            lines.append(f"{head}  {region:8}{cells}  {show(difference(after, before)):24}"
                         f"{against[0]:24}{against[1]:24}".rstrip())  # fmt: skip
        right = [f"{k} {sum(arm[k]['glyph_easy']) / len(arm[k]['glyph_easy']):.2f} "
                 f"{sum(arm[k]['glyph_hard']) / len(arm[k]['glyph_hard']):.2f}"
                 for k in ("before", "after")]  # fmt: skip
        lines.append(f"{'':24}glyphs {', '.join(right)}")
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--rules", nargs="+", default=RULES, metavar="NAME")
    parser.add_argument("--seconds", type=float, default=60, help="of tuning a rule; default: 60")
    parser.add_argument("--steps", type=int, default=10**9, help="at most so many")
    parser.add_argument("--step-clips", type=int, default=16, help="clips a step; default: 16")
    parser.add_argument("--clips", type=int, default=128, help="to examine; default: 128")
    parser.add_argument("--batch", type=int, default=64, help="clips of a rollout; default: 64")
    parser.add_argument("--weights", type=Path, help="folder of an export; default: the package's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="what to write where there is no git")
    parser.add_argument("--results", type=Path, metavar="FILE", help="JSON")
    args = parser.parse_args(argv)
    from lightforcing import world

    begin, table = time.perf_counter(), TABLES[64]
    every = {r.name: r for r in rows(table, selectors.names())}
    unknown = [n for n in args.rules if n not in every]
    if unknown:
        parser.error(f"--rules: no rule {', '.join(unknown)}; there are {', '.join(every)}")

    def report(line):
        print(f"{time.perf_counter() - begin:6.1f} s  {line}", flush=True)

    model = world.load_world(args.weights, device=args.device, dtype=torch.float32)
    exam_clips = clips(range(EXAM_SEED, EXAM_SEED + args.clips), device=args.device)
    found = run(model, table, [every[n] for n in args.rules], exam_clips, args, report)
    print("\n".join(text(found)))
    if args.results:
        record = {"facts": facts(args), "seconds": args.seconds, "rules": found}
        args.results.write_text(json.dumps(record) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
