"""Does tuning close the gap? The world model tuned briefly under each rule, then examined under it.

    python benchmarks/tuning.py [--rules "mass count" "hsa cag" ...] [--seconds 60] [--clips N]
                                [--weights FOLDER] [--out FOLDER] [--results PREFIX]

Sparse attention is published with weights that were tuned for it. Here each rule starts from the
same weights and tunes for as many steps on the same clips, its attention masked by the lists that
the rule chooses for the queries and keys of the moment; a dense arm of the same length is the
control. The first rule has --seconds, the others as many steps as it took (--clock gives each the
same time instead). Then every tuned model continues the exam clips under every rule. Blocks are
those of the quality table (64 px, 16 tokens); no list has a gradient, what it keeps has.

In training the attention is plain torch under a mask, much slower than the kernels: it is about
what is learned, not about speed. A rule that is done is kept in --out, and not tuned again at the
same commit with the same weights and settings.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path

import _here  # noqa: F401
import torch
import torch.nn.functional as F
from _arguments import count, device, duration, new_file, new_folder, number, seed
from _paired import Store, difference, digest, interval, show
from _rules import TABLES, rows
from quality import Exam, facts

from lightforcing import selectors
from lightforcing.selectors import Geometry
from lightforcing.world.data import CHUNK, EXAM_SEED, clips
from lightforcing.world.layout import Layout
from lightforcing.world.muon import Muon

RULES = ("mass count", "hsa cag", "dense")
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


def run(model, table, arms, exam_clips, args, report, store=None):
    """Tune every arm, and examine it under every rule.

    Args:
        model: a world model in float32.
        table: block sizes and resolution.
        arms: ``_rules.Row``s; the first one's steps hold for the others unless ``args.clock``.
        exam_clips: to examine with.
        args: of :func:`main`.
        report: called with a line now and then.
        store: a ``_paired.Store`` of finished arms; None keeps them in memory only.

    Returns:
        {rule: steps, seconds, ``before`` (the untuned model's scores under the rule) and ``after``
        (the tuned one's, by the rule it runs under)}.
    """
    device = model.device
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    found, steps = {}, args.steps

    def scores(weights, row):
        exam = Exam(copy.deepcopy(weights).to(dtype), exam_clips, table, args.batch, args.seed)
        return exam.run(row)["scores"]

    for row in arms:
        arm = None if store is None else store.get(row.name)
        if arm is None:
            before, begin = scores(model, row), time.perf_counter()
            limit = args.seconds if args.clock or not found else float("inf")
            tuned, took = tune(
                model, table, row, seconds=limit, steps=steps, batch=args.step_clips,
                seed=args.seed, report=report,
            )  # fmt: skip
            seconds = time.perf_counter() - begin
            after = {other.name: scores(tuned, other) for other in arms}
            arm = dict(steps=took, seconds=round(seconds, 1), before=before, after=after)
            if store is not None:
                arm = store.put(row.name, **arm)
            report(f"{row.name}: {took} steps in {seconds:.1f} s")
        found[row.name] = arm
        if not args.clock:
            steps = found[arms[0].name]["steps"]
    return found


def text(found):
    """Lines: each rule before and after its tuning, and every tuned model under every rule."""
    lines = [f"{'tuned, run under':16}{'steps':>6}  {'region':8}{'untuned':>9}{'tuned':>8}  "
             f"{'gained [95 %]':24}{'- dense, untuned':24}{'- dense, both tuned':24}"]  # fmt: skip
    control = found.get("dense")
    for name, arm in found.items():
        here = {"before": arm["before"], "after": arm["after"][name]}
        for region in ("bare", "back", "all"):
            before, after = (here[k][region] for k in ("before", "after"))
            means = [interval(x)[0] for x in (before, after)]
            cells = "".join("-".rjust(w) if m is None else f"{m:{w}.2f}"
                            for m, w in zip(means, (9, 8), strict=True))  # fmt: skip
            against = ["", ""]
            if control is not None and arm is not control:
                dense = {"before": control["before"], "after": control["after"]["dense"]}
                against = [show(difference(here[k][region], dense[k][region])) for k in here]
            head = f"{name:16}{arm['steps']:>6}" if region == "bare" else " " * 22
            lines.append(f"{head}  {region:8}{cells}  {show(difference(after, before)):24}"
                         f"{against[0]:24}{against[1]:24}".rstrip())  # fmt: skip
        right = [f"{k} {_share(here[k]['glyph_easy'])} {_share(here[k]['glyph_hard'])}"
                 for k in here]  # fmt: skip
        lines.append(f"{'':24}glyphs {', '.join(right)}")
    for region in ("bare", "back", "all"):
        lines += ["", f"{region}, dB: tuned under a rule (lines), run under another (columns)"]
        lines.append(f"{'':16}" + "".join(f"{name:>14}" for name in found))
        untuned = "".join(_mean(arm["before"][region]) for arm in found.values())
        lines.append(f"{'untuned':16}{untuned}")
        for name, arm in found.items():
            cells = "".join(_mean(arm["after"][other][region]) for other in found)
            lines.append(f"{name:16}{cells}")
    others = [n for n in found if n != "dense"]
    pairs = [(a, b) for a in others for b in others if a != b]
    if pairs:
        lines += ["", "paired differences, 95 % over clips"]
        lines.append(f"{'':54}" + "".join(f"{n:24}" for n in ("bare", "back", "all")).rstrip())
    for a, b in pairs:
        for label, one, two in (
            (f"{a} - {b}, each tuned for itself", found[a]["after"][a], found[b]["after"][b]),
            (f"tuned under {b}: {a} - {b}", found[b]["after"][a], found[b]["after"][b]),
        ):
            cells = [show(difference(one[n], two[n])) for n in ("bare", "back", "all")]
            lines.append(f"{label:54}" + "".join(f"{c:24}" for c in cells).rstrip())
    return lines


def _mean(values):
    mean = interval(values)[0]
    return "-".rjust(14) if mean is None else f"{mean:14.2f}"


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
        "--seconds", type=duration, default=60, help="of the first rule; default: 60"
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
    unknown = [n for n in args.rules if n not in every]
    if unknown:
        parser.error(f"--rules: no rule {', '.join(unknown)}; there are {', '.join(every)}")

    def report(line):
        print(f"{time.perf_counter() - begin:6.1f} s  {line}", flush=True)

    try:
        model = world.load_world(args.weights, device=args.device, dtype=torch.float32)
    except (ValueError, OSError) as error:
        parser.error(f"--weights: {error}")
    exam_clips = clips(range(EXAM_SEED, EXAM_SEED + args.clips), device=args.device)
    settings = ("rules", "seconds", "clock", "steps", "step_clips", "clips", "seed")
    key = facts(args) | {"weights": digest(model)} | {n: getattr(args, n) for n in settings}
    store = Store(args.out / "tuning.jsonl", key)
    found = run(model, table, [every[n] for n in args.rules], exam_clips, args, report, store)
    head = [
        "{device}; commit {commit}, weights {weights}, torch {torch}".format(**key),
        f"64 px, {args.clips} clips, {args.step_clips} clips a step; seconds of tuning: "
        + ", ".join(f"{name} {arm['seconds']:.0f}" for name, arm in found.items()),
        "",
    ]
    shown = "\n".join(head + text(found))
    print(shown)
    if args.results:
        args.results.parent.mkdir(parents=True, exist_ok=True)
        record = {"facts": store.key, "rules": found}
        args.results.with_suffix(".json").write_text(json.dumps(record) + "\n")
        args.results.with_suffix(".txt").write_text(shown + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
