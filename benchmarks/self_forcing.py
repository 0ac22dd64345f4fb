"""How much faster the DiT of an unmodified Self Forcing checkout makes a 5 s video when patched.

    python benchmarks/self_forcing.py PATH [--preset paper --preset fast] [--rounds 3] [--json FILE]
                                      [--profile] [--share FILE]

PATH is a checkout of Self Forcing (its files are read, never written). Its own pipeline and chunk
loop run at the released size: 1.3B, 30 layers, 12 heads of 128, 21 latent frames of 60 x 104 (1560
tokens), bf16, four steps and a clean pass a chunk, 1050 self-attention calls a video. Weights are
random, the text encoder and the VAE are stand-ins that take no time, so the loop is the DiT and the
scheduler. Dense attention is the checkout's own fallback, torch's SDPA, with cuDNN first.

Videos take turns: dense, each preset, and one whose self-attention is left out (the queries are
returned), which no faster attention can beat: that is the limit of patching attention alone. The
loop reads a counter back from the GPU in every layer, so the GPU waits while the host launches the
next kernels. `--profile` makes one more video of each after the first round and says of its last
chunk, from torch.profiler, what share of the wall time the GPU was busy, in kernels of which kind
(attention includes cross-attention), and which kernels took longest; the wall time is that of the
same chunk without the profiler. `--share` also times every attention call, chunk by chunk, for the
picture of attention_share.py. Both come after the first round, so that no budget cuts them off.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import statistics
import sys
import time
from collections import Counter

import _here  # noqa: F401
import torch
from _arguments import count, duration, folder, new_file
from _build import Rollout
from _checkout import Checkout
from _entries import Size, Variant, recognise
from timing import clocks, machine
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import lightforcing as lf

RELEASED = dict(dim=1536, heads=12, ffn=8960, freq=256, text=4096, height=60, width=104, chunks=7)
ORDER = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
FREE = "no self-attention"
KINDS = {  # by what a kernel's name holds, the first that fits
    "attention": r"attend(_sm90)?_kernel|sdpa|flash|fmha",
    "selection": r"\b(choose|mean_scores|pair|pair_sm90|pool|compress)_kernel",
    "products": r"gemm|nvjet|cutlass|xmma|cublas",
    "other": "",
}


class Clock:
    """Begins of the model's forwards on the host, and a profile of some of them."""

    def __init__(self, generator, forwards):
        self.forwards, self.begins, self.profiled = forwards, [], None
        self.wanted = None  # (first, last) forward to profile
        generator.register_forward_pre_hook(self._begin)
        generator.register_forward_hook(self._end)

    def _begin(self, *unused):
        if self.wanted and len(self.begins) == self.wanted[0]:
            torch.cuda.synchronize()
            self.profiled = profile(activities=[ProfilerActivity.CUDA])
            self.profiled.__enter__()
        self.begins.append(time.perf_counter())

    def _end(self, *unused):
        if self.wanted and len(self.begins) == self.wanted[1] + 1:
            torch.cuda.synchronize()
            self.profiled.__exit__(None, None, None)


def without_attention(checkout):
    """Its layers' dense call, replaced by a copy of the queries, while the block lasts."""

    @contextlib.contextmanager
    def replaced():
        changed = []
        for name, module in checkout.loaded().items():
            if name.endswith("causal_model") and hasattr(module, "attention"):
                changed.append((module, module.attention))
                module.attention = lambda q, k, v: q.clone()
        try:
            yield
        finally:
            for module, attention in changed:
                module.attention = attention

    return replaced()


def way(name, rollout):
    """The context in which a named video is made."""
    if name == "dense":
        return contextlib.nullcontext()
    if name == FREE:
        return without_attention(rollout.checkout)
    return lf.patched(rollout.pipeline, name, strict=True)


def video(name, rollout, clock, wanted=None):
    """One video: seconds, seconds of each chunk, the handle's counts, and are all values finite."""
    clock.begins, clock.wanted = [], wanted
    with way(name, rollout) as handle, sdpa_kernel(ORDER, set_priority=True):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        latents = rollout.run(0)
        torch.cuda.synchronize()
        end = time.perf_counter()
        stats = handle.stats() if isinstance(handle, lf.Handle) else None
    finite = bool(torch.isfinite(latents).all())
    marks = [*clock.begins[:: clock.forwards], end]
    chunks = [b - a for a, b in zip(marks, marks[1:], strict=False)]
    return end - begin, chunks, stats, finite


def kind(kernel):
    """What a kernel of this name is for."""
    return next(name for name, held in KINDS.items() if re.search(held, kernel))


def summary(events):
    """What the GPU did.

    Args:
        events: (name, begin, end) of every kernel and copy, microseconds.

    Returns:
        A dict: ``kernels``, their number; ``busy_ms``, during which one ran or several;
        ``kinds_ms``, sums by :data:`KINDS`; ``longest``, eight names with calls and ms.
    """
    spent, count, busy, until = Counter(), Counter(), 0.0, float("-inf")
    for name, begin, end in sorted(events, key=lambda e: e[1:]):
        spent[name] += end - begin
        count[name] += 1
        busy += max(0.0, end - max(begin, until))  # a kernel may begin in the last one's tail
        until = max(until, end)
    kinds = dict.fromkeys(KINDS, 0.0)
    for name, us in spent.items():
        kinds[kind(name)] += us * 1e-3
    longest = [
        {"kernel": name[:90], "calls": count[name], "ms": us * 1e-3}
        for name, us in spent.most_common(8)
    ]
    return {
        "kernels": sum(count.values()),
        "busy_ms": busy * 1e-3,
        "kinds_ms": kinds,
        "longest": longest,
    }


def kernels(profiled):
    """The :func:`summary` of a profile."""
    cuda = torch.autograd.DeviceType.CUDA
    return summary(
        (e.name, e.time_range.start, e.time_range.end)
        for e in profiled.events()
        if e.device_type == cuda
    )


def released(path, layers=30):
    """The checkout's own pipeline at its released size, ready to run."""
    checkout = Checkout(path)
    entry = next(e for e in recognise(checkout)[0] if e.kind == "few-step")
    size = Size(layers=layers, device="cuda", **RELEASED)
    return Rollout(checkout, entry, Variant("no window"), size)


class Budget:
    """Seconds that the measuring may take; what is measured by then is kept."""

    def __init__(self, seconds):
        self.start, self.seconds = time.perf_counter(), seconds

    def spent(self):
        return time.perf_counter() - self.start > self.seconds


def run(options, record, save):
    """Fill the record, saving it after every video."""
    budget = Budget(options.seconds)
    rollout = released(options.path, options.layers)
    checkout, clock = rollout.checkout, Clock(rollout.pipeline.generator, forwards=5)
    names = ["dense", *options.preset, FREE]
    record |= {
        "environment": machine() | {"clocks": clocks()},
        "checkout": {"name": checkout.name, "commit": checkout.commit(),
                     "standins": checkout.standins},
        "settings": {"layers": options.layers, "frames": rollout.frames, **RELEASED},
        "seconds": {n: [] for n in names}, "chunk_seconds": {}, "counts": {}, "finite": {},
        "last_chunk": {},
    }  # fmt: skip
    print(f"built; the first video took {video('dense', rollout, clock)[0]:.2f} s", flush=True)
    for turn in range(options.rounds):
        for name in names:
            if turn and budget.spent():
                return
            spent, record["chunk_seconds"][name], stats, finite = video(name, rollout, clock)
            record["seconds"][name].append(spent)
            record["finite"][name] = finite
            if stats is not None:
                kept = ("calls", "sparse_calls", "density", "dense")
                record["counts"][name] = {n: stats[n] for n in kept}
            print(f"{name}: {spent:.3f} s{'' if finite else ', not finite'}", flush=True)
            save(record)
        if turn:
            continue
        if options.profile:
            profiles(names, rollout, clock, record, budget, save)
        if options.share and not budget.spent():
            from attention_share import checkout_videos, saved

            videos = checkout_videos(rollout, options.preset)
            saved(options.share, "Self Forcing 1.3B", record["environment"], videos)


def profiles(names, rollout, clock, record, budget, save):
    """Fill ``last_chunk``: a video of each name, its last chunk under the profiler."""
    last = (rollout.size.chunks - 1) * clock.forwards
    for name in names:
        if budget.spent():
            return
        wall = 1e3 * record["chunk_seconds"][name][-1]
        try:
            video(name, rollout, clock, (last, last + clock.forwards - 1))
            row = record["last_chunk"][name] = kernels(clock.profiled) | {"wall_ms": wall}
            print(
                f"{name}: busy {row['busy_ms']:.0f} of {wall:.0f} ms in its last chunk", flush=True
            )
        except Exception as error:  # the times are worth keeping without a profile
            print(f"no profile of {name}: {type(error).__name__}: {error}", flush=True)
        save(record)


def text(record):
    """The tables."""
    facts, median = record["environment"], statistics.median
    lines = [
        f"{facts['card']}, torch {facts['torch']}, cuDNN {facts['cudnn']}, "
        f"{record['checkout']['name']} at {record['checkout']['commit']}, "
        f"lightforcing {facts['lightforcing']} ({facts['commit']})",
        f"{'DiT of a video':<20} {'seconds':>8} {'FPS':>6} {'x dense':>8}   chunks, ms",
    ]
    dense = median(record["seconds"]["dense"])
    pictures = 4 * record["settings"]["frames"] - 3  # of the VAE, from latent frames
    for name, seconds in record["seconds"].items():
        if not seconds:
            continue
        chunks = " ".join(f"{1e3 * c:.0f}" for c in record["chunk_seconds"][name])
        spent = median(seconds)
        lines.append(
            f"{name:<20} {spent:>8.3f} {pictures / spent:>6.1f} {dense / spent:>8.2f}   {chunks}"
        )
    return "\n".join(lines + profile_lines(record["last_chunk"]))


def profile_lines(rows):
    """The table of the profiles, and under it the longest kernels of each."""
    if not rows:
        return []
    kinds = " ".join(f"{name:>9}" for name in KINDS)
    lines = [f"{'last chunk, ms':<20} {'wall':>8} {'GPU busy':>14} {kinds} {'kernels':>8}"]
    for name, row in rows.items():
        kinds = " ".join(f"{ms:>9.1f}" for ms in row["kinds_ms"].values())
        share = row["busy_ms"] / row["wall_ms"]
        lines.append(
            f"{name:<20} {row['wall_ms']:>8.1f} {row['busy_ms']:>8.1f} {share:>5.0%} {kinds} "
            f"{row['kernels']:>8}"
        )
    for name, row in rows.items():
        lines.append(f"longest of {name}: ms, calls, kernel")
        lines += [f"    {k['ms']:>8.2f} {k['calls']:>6}  {k['kernel']}" for k in row["longest"]]
    return lines


def arguments(argv):
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("path", type=folder, help="folder of a Self Forcing checkout")
    parser.add_argument(
        "--preset", action="append", choices=lf.PRESETS, help="may be repeated; default: paper fast"
    )
    parser.add_argument("--layers", type=count, default=30)
    parser.add_argument("--rounds", type=count, default=3)
    parser.add_argument("--seconds", type=duration, default=300, help="begin no further part after")
    parser.add_argument("--profile", action="store_true", help="kernels of the last chunk")
    parser.add_argument(
        "--share", type=new_file, metavar="FILE", help="JSON for attention_share.py"
    )
    parser.add_argument("--json", type=new_file, metavar="FILE")
    options = parser.parse_args(argv)
    options.preset = options.preset or ["paper", "fast"]
    return options


def main(argv=None):
    """Run, print, keep."""
    options = arguments(argv)
    if not torch.cuda.is_available():
        print("self_forcing: needs a GPU; benchmarks/pipelines.py runs checkouts on the CPU")
        return 2
    record = {}

    def save(record):
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(record, indent=1) + "\n")

    run(options, record, save)
    print(text(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
