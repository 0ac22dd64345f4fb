"""Share of self-attention in the run time of a causal Wan, chunk by chunk, dense and sparse.

    python benchmarks/attention_share.py [--size 1.3B] [--frames 21] [--preset paper --preset fast]
                                         [--json FILE] [--plot FILE]
    python benchmarks/attention_share.py --saved FILE --plot FILE (the picture of a saved run)

Our own model with random weights makes one video dense and one with each preset, from the same
noise: five forwards a chunk (four steps and the pass that fills the cache). A chunk's time is that
of its forwards; its attention time is the sum over all self-attention calls, selection and pooling
included, taken between CUDA events around each call, on a CPU by the clock. Where the host is
slower than the GPU (few frames, small models) the time between two events also holds the host's
time for the launches, as a user would feel it. A dense call is torch's SDPA: cuDNN where torch
prefers it, see `--backend`.

self_forcing.py --share times an unmodified Self Forcing in the same way; --saved draws both.

On a GPU the size is 1.3B at 60 x 104 latents, on a CPU tiny at 16 x 24. Every video runs once more
in front with one step a chunk: each of its lengths of keys is a kernel to be chosen or compiled.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time

import _here  # noqa: F401
import torch
from _arguments import count, device, new_file, old_file
from torch.nn.attention import SDPBackend, sdpa_kernel

import lightforcing as lf
from lightforcing.models import CausalWan, Rollout, WanConfig, layers

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "default": None,
}


class AttentionClock:
    """Times every call of a module's ``attention`` with itself while it is entered."""

    def __init__(self, cuda, module=layers):
        self.cuda, self.module = cuda, module
        self.marks = []  # (begin, end) of every call

    def __enter__(self):
        inner = self.inner = self.module.attention  # a patched model's shim, if there is one

        def timed(q, k, v, *rest):
            if k.shape[1] < q.shape[1]:  # cross-attention: its text is shorter than a chunk
                return inner(q, k, v, *rest)
            begin = self._mark()
            out = inner(q, k, v, *rest)
            self.marks.append((begin, self._mark()))
            return out

        self.module.attention = timed
        return self

    def __exit__(self, *error):
        self.module.attention = self.inner

    def _mark(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self):
        """Seconds and number of the calls since the last time; waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()
            spent = sum(begin.elapsed_time(end) for begin, end in self.marks) / 1e3
        else:
            spent = sum(end - begin for begin, end in self.marks)
        calls, self.marks = len(self.marks), []
        return spent, calls


def one_video(rollout, options, context, preset):
    """A row for each chunk of one video, dense (preset None) or patched."""
    device, rows = rollout.model.device, []
    backend = BACKENDS[options.backend] if device.type == "cuda" else None
    with contextlib.ExitStack() as stack:
        if backend is not None:
            order = [backend, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
            stack.enter_context(sdpa_kernel(order, set_priority=True))
        if preset is not None:
            stack.enter_context(lf.patched(rollout.model, preset, num_frames=options.frames))
        clock = stack.enter_context(AttentionClock(device.type == "cuda"))
        # Chunk by chunk, so that reading a chunk's clock does not wait inside the next one.
        for chunk in rollout.stream(
            options.frames, size=(options.height, options.width), context=context, seed=0
        ):
            attention, calls = clock.take()
            rows.append(
                {
                    "chunk": chunk.index + 1,
                    "resident_frames": chunk.start_frame + chunk.latents.shape[1],
                    "seconds": chunk.seconds,
                    "attention_seconds": attention,
                    "calls": calls,
                    "share": attention / chunk.seconds,
                }
            )
    return rows


def run(options):
    """All videos: name -> rows."""
    device = torch.device(options.device)
    changes = {} if options.layers is None else {"num_layers": options.layers}
    config = WanConfig.named(options.size, **changes)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = CausalWan(config, seed=0, device=device, dtype=dtype)
    context = None
    if config.cross_attention:
        context = torch.randn(1, config.text_len, config.text_dim, device=device, dtype=dtype)
    rollout = Rollout(model)
    short = Rollout(model, steps=[1000])
    videos = {}
    for preset in (None, *options.preset):
        one_video(short, options, context, preset)
        videos[preset or "dense"] = one_video(rollout, options, context, preset)
    return videos


def checkout_videos(rollout, presets):
    """The same of a Self Forcing checkout at its released size, see self_forcing.py."""
    from self_forcing import ORDER

    (module,) = (
        m for n, m in rollout.checkout.loaded().items() if n.endswith("modules.causal_model")
    )
    videos = {}
    for name in ("dense", *presets):
        patched = contextlib.nullcontext()
        if name != "dense":
            patched = lf.patched(rollout.pipeline, name, strict=True)
        with patched, sdpa_kernel(ORDER, set_priority=True), AttentionClock(True, module) as clock:
            videos[name] = _chunks_of(rollout, clock)
    return videos


def saved(path, title, facts, videos, **settings):
    """Write what the picture is made from."""
    record = {"title": title, "environment": facts, "settings": settings, "videos": videos}
    record["totals"] = {name: totals(rows) for name, rows in videos.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def _chunks_of(rollout, clock, forwards=5):
    """Rows of one video; the loop is not ours, so a chunk ends where the next one's model runs."""
    rows, begins = [], []

    def close():
        attention, calls = clock.take()
        begins.append(time.perf_counter())
        if len(begins) > 1:
            seconds = begins[-1] - begins[-2]
            rows.append(
                {
                    "chunk": len(rows) + 1,
                    "resident_frames": rollout.variant.chunk * (len(rows) + 1),
                    "seconds": seconds,
                    "attention_seconds": attention,
                    "calls": calls,
                    "share": attention / seconds,
                }
            )

    count = iter(range(10**9))
    hook = rollout.pipeline.generator.register_forward_pre_hook(
        lambda *unused: close() if next(count) % forwards == 0 else None
    )
    rollout.run(0)
    close()
    hook.remove()
    return rows


def totals(rows):
    """Seconds of a video, and attention's share of it."""
    whole, attention = (sum(r[name] for r in rows) for name in ("seconds", "attention_seconds"))
    return {"seconds": whole, "attention_seconds": attention, "share": attention / whole}


def table(videos):
    """The text."""
    lines = [f"{'chunk':>5} {'frames':>6}" + "".join(f" | {name:^29}" for name in videos)]
    lines.append(" " * 12 + f" | {'ms':>8} {'attention':>10} {'share':>8} " * len(videos))

    def cells(row):
        return (
            f" | {1e3 * row['seconds']:>8.1f} {1e3 * row['attention_seconds']:>10.1f} "
            f"{row['share']:>8.1%} "
        )

    for rows in zip(*videos.values(), strict=True):
        line = f"{rows[0]['chunk']:>5} {rows[0]['resident_frames']:>6}"
        lines.append(line + "".join(cells(row) for row in rows))
    ends = [totals(rows) for rows in videos.values()]
    lines.append(f"{'video':>12}" + "".join(cells(end) for end in ends))
    for name, end in list(zip(videos, ends, strict=True))[1:]:
        lines.append(
            f"{name}: the video {ends[0]['seconds'] / end['seconds']:.2f}x, its attention "
            f"{ends[0]['attention_seconds'] / end['attention_seconds']:.2f}x faster than dense"
        )
    return "\n".join(lines)


def plot(videos, path, title):
    """Milliseconds of every chunk, attention and the rest, and the share above the bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(videos), figsize=(3.6 * len(videos) + 0.6, 3.4), sharey=True, squeeze=False
    )
    for ax, (name, rows) in zip(axes[0], videos.items(), strict=True):
        chunks = [r["chunk"] for r in rows]
        attention = [1e3 * r["attention_seconds"] for r in rows]
        rest = [1e3 * r["seconds"] - a for r, a in zip(rows, attention, strict=True)]
        ax.bar(chunks, rest, color="#c9ced6", label="everything else")
        ax.bar(chunks, attention, bottom=rest, color="#d1495b", label="self-attention")
        for r in rows:
            ax.text(
                r["chunk"], 1e3 * r["seconds"], f"{r['share']:.0%}", ha="center", va="bottom",
                fontsize=7,
            )  # fmt: skip
        ax.set_title(name, fontsize=10)
        ax.set_xlabel("chunk")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("ms a chunk (5 forwards)")
    axes[0, 0].legend(frameon=False, fontsize=8, loc="upper left")
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def environment(options):
    """What the figures depend on."""
    import platform

    from timing import commit

    facts = {
        "torch": torch.__version__,
        "lightforcing": lf.__version__,
        "commit": commit(),
        "python": platform.python_version(),
    }
    if torch.device(options.device).type == "cuda":
        from timing import clocks, machine

        facts |= machine() | {"clocks": clocks()}
    return facts


def arguments(argv):
    """Parse the command line."""
    cuda = torch.cuda.is_available() and bool(lf.info()["cuda_built"])
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--device", type=device, default="cuda" if cuda else "cpu")
    parser.add_argument(
        "--size", choices=["1.3B", "14B", "5B", "tiny"], help="default by the device"
    )
    parser.add_argument("--layers", type=count, help="fewer layers: the share stays about the same")
    parser.add_argument("--frames", type=count, default=21, help="latent frames (default 21)")
    parser.add_argument("--height", type=count, help="of the latents")
    parser.add_argument("--width", type=count, help="of the latents")
    parser.add_argument(
        "--preset", action="append", choices=lf.PRESETS, help="may be repeated; default: paper fast"
    )
    parser.add_argument("--backend", choices=BACKENDS, default="cudnn", help="of dense attention")
    parser.add_argument(
        "--saved", type=old_file, metavar="FILE", help="JSON of a run: only plot it"
    )
    parser.add_argument("--json", type=new_file, metavar="FILE")
    parser.add_argument("--plot", type=new_file, metavar="FILE", help="a picture; needs matplotlib")
    options = parser.parse_args(argv)
    if options.frames < 6 or options.frames % 3:
        parser.error(f"--frames: expected a multiple of 3 of at least 6, got {options.frames}")
    for name in ("height", "width"):
        if (getattr(options, name) or 0) % 2:
            parser.error(f"--{name}: expected an even number, got {getattr(options, name)}")
    if options.saved and not options.plot:
        parser.error("--saved: expected --plot beside it, got none")
    small = not options.device.startswith("cuda")
    options.size = options.size or ("tiny" if small else "1.3B")
    options.height = options.height or (16 if small else 60)
    options.width = options.width or (24 if small else 104)
    options.preset = options.preset or ["paper", "fast"]
    return options


def main(argv=None):
    """Run, print, keep."""
    options = arguments(argv)
    if options.saved:
        try:
            record = json.loads(options.saved.read_text())
            videos, title = record["videos"], record["title"]
        except (ValueError, KeyError, TypeError):
            print(f"--saved: expected what --json wrote, got {options.saved}", file=sys.stderr)
            return 2
        plot(videos, options.plot, title)
        return 0
    facts = environment(options)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    title = (
        f"causal Wan {options.size}, {options.frames} frames of {options.height} x {options.width}"
    )
    if facts.get("card"):
        title += f", {facts['card']}"
    print(title)
    videos = run(options)
    print(table(videos))
    if options.json:
        settings = {n: v for n, v in vars(options).items() if n not in ("json", "plot", "saved")}
        saved(options.json, title, facts, videos, **settings)
    if options.plot:
        try:
            plot(videos, options.plot, title)
        except ImportError:
            print("no plot: matplotlib is not installed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
