"""Command line: ``python -m lightforcing info|doctor|selftest|explain|demo|bench``.

Each command imports what it needs when it runs, so ``info`` works without torch and
``explain`` without a compiler. Exit codes: 0 done, 1 the answer is "something is broken",
2 a wrong argument or a missing package, said in one sentence on stderr.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
from pathlib import Path


class Stop(Exception):
    """Ends a command with a sentence for the user and exit code 2."""


def need(module: str, extra: str, purpose: str):
    """Import an optional package, or stop with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Stop(
            f"{purpose} needs {module.partition('.')[0]}: pip install 'lightforcing[{extra}]'"
        ) from error


def show(options, value, text) -> None:
    """Print ``value`` as JSON when asked to, else the text for people."""
    print(json.dumps(value, indent=2) if options.json else text)


# ---- commands ------------------------------------------------------------------------


def info(options) -> int:
    """Print what this build is."""
    from . import doctor

    facts = doctor.facts()
    width = max(map(len, facts))
    show(options, facts, "\n".join(f"{k:<{width}}  {doctor.said(v)}" for k, v in facts.items()))
    return 0


def diagnose(options) -> int:
    """Check the build, the drivers and the packages; exit 1 when something is broken."""
    from . import doctor

    checks = doctor.checks()
    healthy = all(c["state"] != "broken" for c in checks)
    lines = []
    for check in checks:
        lines.append(f"{check['state']:<8} {check['name']:<10} {check['found']}")
        if check["advice"]:
            lines.append(f"{'':<19} {check['advice']}")
    lines.append("healthy" if healthy else "broken: see above")
    show(options, {"healthy": healthy, "checks": checks}, "\n".join(lines))
    return 0 if healthy else 1


def selftest(options) -> int:
    """Compare every operator with the float64 reference; exit 1 when one is off."""
    from . import selftest as checks

    report = None if options.json else lambda row: print(checks.line(row), flush=True)
    rows = checks.run(seconds=options.seconds, seed=options.seed, report=report)
    failed, untested = [r for r in rows if not r["ok"]], checks.why_not_cuda()
    if untested and report:
        print(f"CUDA: not tested, {untested}")
    done = f"{len(rows) - len(failed)} of {len(rows)} checks passed (seed {options.seed})"
    answer = {"ok": not failed, "seed": options.seed, "cuda_untested": untested, "checks": rows}
    show(options, answer, done)
    return 1 if failed else 0


def settings(options):
    """The preset with the numbers given on the command line."""
    import lightforcing as lf

    config = lf.Config.preset(options.preset, sparsity=options.sparsity)
    return config if options.window is None else config.replace(window=options.window)


def explain(options) -> int:
    """Print the schedule chunk by chunk, and draw it with ``--plot``."""
    from .report import plan

    page = plan(
        settings(options),
        num_frames=options.num_frames,
        frames_per_chunk=options.frames_per_chunk,
        frame_tokens=options.frame_tokens,
        attention_share=options.attention_share,
    )
    if options.plot:
        need("matplotlib", "viz", "--plot")
        from . import plots

        plots.schedule(page, options.plot)
    show(options, page.to_dict(), str(page))
    return 0


def demo(options) -> int:
    """Continue a known video by several attention rules, side by side, and write the pictures."""
    need("torch", "models", "demo")
    need("safetensors", "models", "demo")
    for module in ("imageio", "imageio_ffmpeg", "PIL", "tqdm"):
        need(module, "viz", "demo")
    from . import demo as film

    result = film.run(options)
    show(options, result, film.summary(result))
    return 0


def bench(options) -> int:
    """Time dense and sparse attention on this CPU."""
    from . import bench as clock

    result = clock.run(
        settings(options),
        frame_tokens=options.frame_tokens,
        seconds=options.seconds,
        threads=options.threads,
    )
    show(options, result, clock.text(result))
    return 0


# ---- arguments -----------------------------------------------------------------------


def positive(text: str) -> int:
    """An argument that is an integer >= 1."""
    if not text.isdecimal() or not 1 <= int(text) <= 1_000_000:
        raise argparse.ArgumentTypeError(f"expected an integer from 1 to 1000000, got {text}")
    return int(text)


def number(text: str) -> int:
    """An argument that is an integer >= 0."""
    if not text.isdecimal() or int(text) > 1_000_000:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to 1000000, got {text}")
    return int(text)


def share(text: str) -> float:
    """An argument that is a number above 0 and below 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and below 1, got {text}")
    return value


def seconds(text: str) -> float:
    """An argument that is a finite time above 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 86400:
        raise argparse.ArgumentTypeError(f"expected seconds, above 0 and up to 86400, got {text}")
    return value


def device(text: str) -> str:
    """An argument that is the CPU or a CUDA GPU of this machine."""
    import torch

    try:
        good = torch.device(text).type in ("cpu", "cuda")
        if good:
            torch.empty(0, device=text)
    except (RuntimeError, AssertionError, NotImplementedError):
        good = False
    if not good:
        raise argparse.ArgumentTypeError(f"expected cpu, or a GPU that torch sees, got {text}")
    return text


def _makeable(path: Path) -> bool:
    """Can a folder of this name be used or made? Tried in the nearest one; nothing is left."""
    nearest = next(p for p in (path, *path.parents) if p.exists())
    try:
        tempfile.TemporaryDirectory(prefix=".lightforcing-", dir=nearest).cleanup()
    except OSError:
        return False
    return True


def new_file(text: str) -> Path:
    """An argument that is a file to write; who writes it makes its folder, where there is none."""
    path = Path(text)
    try:
        where = path.absolute()
        good = not path.is_dir() and _makeable(where.parent)
        good = good and (not path.exists() or os.access(path, os.W_OK))
    except (OSError, ValueError):  # a name too long, or with a zero byte
        good = False
    if not good:
        raise argparse.ArgumentTypeError(
            f"expected a file in a folder that is there or can be made, got {text}"
        )
    return path


def new_folder(text: str) -> Path:
    """An argument that is a folder to write to, there or not yet; it is not made here."""
    path = Path(text)
    try:
        good = _makeable(path.absolute())
    except (OSError, ValueError):
        good = False
    if not good:
        what = ", which is a file" if os.path.isfile(text) else ""
        raise argparse.ArgumentTypeError(
            f"expected a folder that is there or can be made, got {text}{what}"
        )
    return path


def parser() -> argparse.ArgumentParser:
    """Every command with its options."""
    top = argparse.ArgumentParser(
        prog="lightforcing",
        description="Light Forcing: block-sparse attention for autoregressive video diffusion.",
        allow_abbrev=False,  # --frames is no short form of --frames-per-chunk
    )
    commands = top.add_subparsers(dest="command", metavar="command", required=True)

    def add(name, run):
        brief = run.__doc__.splitlines()[0]
        command = commands.add_parser(name, help=brief, description=brief, allow_abbrev=False)
        command.add_argument("--json", action="store_true", help="print JSON for a machine")
        command.set_defaults(run=run)
        return command

    def add_plan(command):
        command.add_argument("--preset", default="balanced", help="default: %(default)s")
        command.add_argument("--sparsity", type=float, help="one number instead of the preset's")
        command.add_argument("--window", type=positive, help="resident frames at most")

    add("info", info)
    add("doctor", diagnose)

    command = add("selftest", selftest)
    command.add_argument("--seconds", type=seconds, default=20, help="budget; default: %(default)s")
    command.add_argument("--seed", type=number, default=0)

    command = add("explain", explain)
    add_plan(command)
    command.add_argument(
        "--num-frames",
        type=positive,
        help="latent frames; default: what patch() plans, 21, or 63 with a window",
    )
    command.add_argument("--frames-per-chunk", type=positive, default=3, help="default: 3")
    command.add_argument(
        "--frame-tokens", type=positive, default=1560, help="default: 1560 (480x832)"
    )
    command.add_argument(
        "--attention-share",
        type=float,
        metavar="SHARE",
        help="measured share of a dense step that is self-attention, 0 to 1",
    )
    command.add_argument("--plot", metavar="FILE", help="draw it as PNG, SVG or PDF")

    command = add("demo", demo)
    command.add_argument(
        "--sparsity",
        type=share,
        default=0.88,
        help="mean share of the key blocks left out; default: %(default)s",
    )
    command.add_argument("--clip", type=number, default=0, help="which video; default: 0")
    command.add_argument("--seed", type=number, default=0, help="of the noise")
    command.add_argument(
        "--view", type=int, choices=(64, 128), default=64, help="pixels of a side; default: 64"
    )
    command.add_argument("--frames", type=positive, default=21, help="default: 21")
    command.add_argument(
        "--out", type=new_folder, default="demo", metavar="FOLDER", help="default: ./demo"
    )

    command = add("bench", bench)
    add_plan(command)
    command.add_argument("--frame-tokens", type=positive, default=1560, help="default: %(default)s")
    command.add_argument("--seconds", type=seconds, default=30, help="budget; default: %(default)s")
    command.add_argument("--threads", type=positive, help="default: OpenMP's own choice")
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one command; its exit code."""
    options = parser().parse_args(argv)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has seen enough; nothing is left to flush to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Stop, ValueError, TypeError, NotImplementedError, OSError, MemoryError) as error:
        print(f"lightforcing {options.command}: {error}", file=sys.stderr)
        return 2
