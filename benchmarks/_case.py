"""One case: a chunk loop run dense, patched and unpatched, with its checks."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from _census import Census, distance, expected, finite, namespaces, self_attentions, solve, table

import lightforcing as lf


@dataclass
class Checks:
    """Named claims with their outcome."""

    rows: list = field(default_factory=list)

    def that(self, claim, holds, detail=""):
        """Note a claim; returns whether it holds."""
        self.rows.append({"claim": claim, "holds": bool(holds), "detail": detail})
        return bool(holds)

    def same(self, claim, a, b):
        """Note that two latents are bit-identical."""
        equal = torch.equal(a, b)
        detail = "" if equal else "rel L2 {:.3g}, max {:.3g}".format(*distance(a, b))
        return self.that(claim, equal, detail)

    @property
    def failed(self):
        """The claims that do not hold."""
        return [row for row in self.rows if not row["holds"]]


def originals(model):
    """Return what a patch may replace: (namespace, its `attention`), before any patch."""
    return [(space, space["attention"]) for space in namespaces(self_attentions(model))]


def restored(model, before):
    """Say what is not as it was before the patch; an empty string if all is."""
    wrong = [f"layer {i} has an instance attribute forward"
             for i, m in enumerate(self_attentions(model)) if "forward" in vars(m)]  # fmt: skip
    wrong += ["attention is another object" for g, f in before if g["attention"] is not f]
    return "; ".join(wrong)


def timed(run):
    """Return a function's result, and the wall and CPU seconds that it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    spent = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    return result, spent


def seconds_by_row(rows, seconds):
    """Spread the seconds of a (first, query) place over the rows that have it."""
    places = [(row["first"], row["query"]) for row in rows]
    return [seconds.get(place, 0.0) / places.count(place) for place in places]


def run_case(rollout, presets):
    """Run one loop dense, with sparsity 0, with every preset, and unpatched.

    Returns:
        A JSON-ready dict: what ran, the calls by chunk, one entry a run, the checks.
    """
    model, size, variant = rollout.pipeline.generator, rollout.size, rollout.variant
    checks, runs = Checks(), []
    before = originals(model)
    names = {"state": sorted(model.state_dict()), "modules": [n for n, _ in model.named_modules()]}

    dense, seconds = timed(rollout.run)
    with Census(model) as census:
        again = rollout.run()
    rows = table(census.calls, variant.chunk)
    for row, spent in zip(rows, seconds_by_row(rows, census.seconds()), strict=True):
        row["dense_cpu_seconds"] = spent
    total = len(census.calls)
    runs.append({"run": "dense", **seconds, "calls": total, "sparse": 0})
    checks.that("dense latents are finite", finite(dense))
    checks.same("dense twice: same latents", again, dense)
    checks.that("every forward calls attention once", all(c.dense for c in census.calls))

    handle = lf.patch(rollout.pipeline, sparsity=0)
    zero, seconds = timed(rollout.run)
    stats = handle.stats()
    runs.append(_run("sparsity=0", seconds, zero, dense, stats))
    checks.same("sparsity=0: latents bit-identical to dense", zero, dense)
    checks.that("sparsity=0: every call counted", stats["calls"] == total, f"{stats['calls']}")
    checks.that("sparsity=0: none sparse", stats["sparse_calls"] == 0)
    handle.unpatch()

    for preset in presets:
        runs.append(_preset(rollout, preset, census.calls, dense, rows, checks))

    bare, seconds = timed(rollout.run)
    runs.append({"run": "unpatched", **seconds, "calls": total, "sparse": 0,
                 "rel_l2": distance(bare, dense)[0]})  # fmt: skip
    wrong = restored(model, before)
    checks.same("unpatched: latents bit-identical to dense", bare, dense)
    checks.that("unpatched: the original objects are back", not wrong, wrong)
    kept = names["state"] == sorted(model.state_dict())
    kept = kept and names["modules"] == [n for n, _ in model.named_modules()]
    checks.that("no parameter, buffer or module came or went", kept)
    return {
        "entry": str(rollout.entry),
        "variant": variant.label,
        "model": f"{type(self_attentions(model)[0]).__module__}",
        "frames": rollout.frames,
        "frames_per_chunk": variant.chunk,
        "frame_tokens": size.frame_tokens,
        "layers": size.layers,
        "heads": size.heads,
        "head_dim": size.dim // size.heads,
        "dtype": str(size.dtype).removeprefix("torch."),
        "chunks": rows,
        "runs": runs,
        "checks": checks.rows,
    }


def _run(name, seconds, latents, dense, stats):
    near, far = distance(latents, dense)
    return {
        "run": name,
        **seconds,
        "rel_l2": near,
        "max_abs": far,
        "calls": stats["calls"],
        "sparse": stats["sparse_calls"],
        "density": stats["density"],
        "dense_calls": stats["dense"],
    }


def _preset(rollout, preset, dense_calls, dense, rows, checks):
    """Run a preset under the census; compare each call with the rule."""
    model, variant, tokens = rollout.pipeline.generator, rollout.variant, rollout.size.frame_tokens
    config = lf.Config.preset(preset)
    schedule = solve(lf, config, variant.chunk, variant.model.get("local_attn_size"))
    wanted = [expected(c, config, schedule, variant.chunk, tokens) for c in dense_calls]
    with Census(model) as census:
        handle = lf.patch(rollout.pipeline, preset, strict=True)
        latents, seconds = timed(rollout.run)
        stats = handle.stats()
        handle.unpatch()
    run = _run(preset, seconds, latents, dense, stats)
    run["expected"] = sum(w < 1 for w in wanted)
    run["keep_frames"] = {str(c["chunk"]): c["keep_frames"] for c in stats["chunks"]
                          if c.get("keep_frames")}  # fmt: skip
    found = [not c.dense for c in census.calls]
    places = [(c.layer, c.first, c.query) for c in census.calls]
    told = f"{sum(found)} of {len(found)} sparse, {run['expected']} expected"
    same = places == [(c.layer, c.first, c.query) for c in dense_calls]
    checks.that(f"{preset}: the loop makes the same calls", same)
    checks.that(f"{preset}: exactly the expected calls are sparse",
                same and found == [w < 1 for w in wanted], told)  # fmt: skip
    checks.that(
        f"{preset}: the handle counts them so",
        stats["sparse_calls"] == sum(found) and stats["calls"] == len(found),
        f"{stats['sparse_calls']} of {stats['calls']}",
    )
    reasons = sum(stats["dense"].values())
    checks.that(f"{preset}: each dense call has its reason", reasons == len(found) - sum(found),
                ", ".join(f"{n} {r}" for r, n in stats["dense"].items()))  # fmt: skip
    weights = [c.rows * c.keys for c in dense_calls]
    density = sum(w * p for w, p in zip(weights, wanted, strict=True)) / sum(weights)
    checks.that(f"{preset}: density as planned", abs(density - stats["density"]) < 1e-9,
                f"{stats['density']:.4f}")  # fmt: skip
    checks.that(f"{preset}: latents are finite, and not the dense ones", finite(latents)
                and (run["expected"] == 0) == torch.equal(latents, dense))  # fmt: skip
    spent = seconds_by_row(rows, census.seconds())
    for row, second in zip(rows, spent, strict=True):
        here = [
            (f, w)
            for f, w, c in zip(found, wanted, dense_calls, strict=True)
            if (c.first, c.query, c.keys) == (row["first"], row["query"], row["keys"])
        ]
        row[preset] = {
            "sparse": sum(f for f, _ in here),
            "density": sum(w for _, w in here) / len(here),
            "cpu_seconds": second,
        }
    return run
