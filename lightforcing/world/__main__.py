"""``python -m lightforcing.world train|evaluate|export|render``."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

from ..cli import device, new_file, new_folder, number, positive, seconds
from ..config import PRESETS
from ..models import load_wan
from . import evaluate, render, weights
from .data import clips
from .model import MODELS, weights_of
from .recipe import RECIPES, shortened
from .train import Trainer, trained

GPU, CPU = {"view": [64, 128], "clips": [256, 64]}, {"view": [64], "clips": [16]}


def train(options) -> int:
    """Train, or go on training; exit 3 when the time was up before the recipe was over."""
    recipe = RECIPES[options.model]
    if options.stages:
        recipe = shortened(recipe, options.stages)
    trainer = Trainer(
        options.folder,
        model=options.model,
        recipe=recipe,
        seed=options.seed,
        device=options.device,
        piece=options.piece and options.piece << 20,
        began=BEGAN,
    )
    return 0 if trainer.run(options.seconds) else 3


def _device(options):
    return options.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _sizes(options):
    """Sizes and numbers of clips, checked before minutes go into them; one number serves all.

    What a GPU does in a minute takes hours on a CPU: there the default is less, and said.
    """
    cpu = not str(_device(options)).startswith("cuda")
    views, counts = (CPU if cpu else GPU).values()
    whole = options.view is None and options.clips is None
    options.view = options.view or list(views)
    options.batch = options.batch or (2 if cpu else 64)
    options.clips = options.clips or (counts if options.view == views else counts[:1])
    for view in options.view:
        if view % 32:
            raise ValueError(f"--view: expected multiples of 32, got {view}")
    if len(options.clips) == 1:
        options.clips = options.clips * len(options.view)
    if len(options.clips) != len(options.view):
        raise ValueError(
            f"--clips: expected one number, or one for each of {len(options.view)} sizes, "
            f"got {len(options.clips)}"
        )
    if cpu:
        told = " and ".join(
            f"{count} clips of {view} px"
            for view, count in zip(options.view, options.clips, strict=True)
        )
        more = "--view {} {} --clips {} {} is what a GPU does, and takes hours".format(
            *GPU["view"], *GPU["clips"]
        )
        print(
            f"{told} on a CPU, each continued twice: the bar tells the time left after the first; "
            + (more if whole else "--clips and --view make it shorter"),
            file=sys.stderr,
        )


def _examined(model, options) -> list[dict]:
    """The gates at every size asked for, with a bar on stderr."""
    results = []
    for view, count in zip(options.view, options.clips, strict=True):
        batch = min(count, max(1, options.batch * 64**2 // view**2))
        # Where nobody watches, a line every ten seconds at most.
        pace = 0.1 if sys.stderr.isatty() else 10
        with tqdm(total=count, desc=f"{view} px", unit="clip", mininterval=pace) as bar:
            results.append(
                evaluate.gates(
                    model,
                    view=view,
                    count=count,
                    batch=batch,
                    progress=lambda done, bar=bar: bar.update(done - bar.n),
                )
            )
        print(evaluate.table(results[-1]), flush=True)
    return results


def gates(options) -> int:
    """Examine weights; exit 1 if a gate fails."""
    _sizes(options)
    device = _device(options)
    dtype = torch.float16 if device != "cpu" else torch.float32
    try:
        if options.weights and Path(options.weights).is_file():
            model = load_wan(options.weights, device=device, dtype=dtype)
        else:
            model = weights.load_world(options.weights, device=device, dtype=dtype)
    except (ValueError, OSError) as error:
        raise ValueError(f"--weights: {error}") from None
    results = _examined(model, options)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if all(r["ok"] for r in results) else 1


def export(options) -> int:
    """Write the weights of a run in 8 bits, examine that file, and write its card.

    All of it is written beside its place and moved there when every gate holds; else exit 1.
    """
    _sizes(options)
    folder = Path(options.folder)
    out = Path(options.out or folder / "export").absolute()
    if out.is_file():  # the default is not argparse's to judge
        raise ValueError(f"--out: expected a folder, got {out}, which is a file")
    model, at = trained(folder)
    log = (folder / "log.jsonl").read_text()
    facts = weights.history([json.loads(s) for s in log.splitlines()], at, weights_of(model))
    out.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f"{out.name}.unproven-", dir=out.parent))
    try:
        weights.export(model, made, facts)
        facts["gates"] = _examined(weights.load_world(made, device=_device(options)), options)
        weights.export(model, made, facts)
        (made / weights.PAGE).write_text(weights.page(weights.card(made)))
        (made / "log.jsonl").write_text(log)
    except BaseException:
        shutil.rmtree(made)
        raise
    if not all(r["ok"] for r in facts["gates"]):
        print(f"export: a gate failed; the failed export is in {made}, nothing was written to "
              f"{out}", file=sys.stderr)  # fmt: skip
        return 1
    out.mkdir(exist_ok=True)
    for path in made.iterdir():
        path.replace(out / path.name)
    made.rmdir()
    print(out)
    return 0


def pictures(options) -> int:
    """Roll examination clips out, dense and under presets, and draw one of them."""
    if unknown := [name for name in options.rules if name not in ("dense", *PRESETS)]:
        raise ValueError(
            f"--rules: expected some of dense, {', '.join(PRESETS)}, got {', '.join(unknown)}"
        )
    model = weights.load_world(options.weights, device=_device(options))
    view = options.view[0]
    clip = clips(options.number + 1, view=view, device=model.device)[options.number :]
    rules = {name: None if name == "dense" else {"preset": name} for name in options.rules}
    found = render.compared(model, clip, rules)
    for label, one in found.items():
        print(f"{label:<12} {one['scores']['all'].item():6.2f} dB  {one['seconds']:6.1f} s")
    for path in render.draw(clip.to("cpu"), found, options.out):
        print(path)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m lightforcing.world", description=__doc__, allow_abbrev=False
    )
    commands = top.add_subparsers(required=True)

    def add(name, run):
        brief = run.__doc__.splitlines()[0]
        command = commands.add_parser(name, help=brief, description=run.__doc__, allow_abbrev=False)
        command.set_defaults(run=run)
        command.add_argument("--device", type=device, help="cpu, cuda ...; the GPU if there is one")
        return command

    def sizes(command):
        command.add_argument(
            "--view", type=positive, nargs="+", help="pixels; default: 64 128, on a CPU 64"
        )
        command.add_argument(
            "--clips", type=positive, nargs="+", help="of each; default: 256 64, on a CPU 16"
        )
        command.add_argument(
            "--batch", type=positive, help="clips of 64 px at a time; default: 64, on a CPU 2"
        )

    command = add("train", train)
    command.add_argument(
        "--folder", type=new_folder, default="world", help="of checkpoint, log and weights"
    )
    command.add_argument("--model", choices=MODELS, default="narrow")
    command.add_argument("--seconds", type=seconds, default=float("inf"), help="of this run")
    command.add_argument("--stages", type=seconds, nargs="+", help="seconds of each stage")
    command.add_argument("--seed", type=number, default=0)
    command.add_argument("--piece", type=positive, help="MiB: checkpoints in files no larger")
    command = add("evaluate", gates)
    command.add_argument("--weights", help="file or folder of an export; else those that ship")
    command.add_argument("--json", type=new_file, help="file for all figures")
    sizes(command)
    command = add("export", export)
    command.add_argument("--folder", default="world", help="of the run; default: world")
    command.add_argument("--out", type=new_folder, help="folder; default: FOLDER/export")
    sizes(command)
    command = add("render", pictures)
    command.add_argument("--weights", help="folder of an export; else those that ship")
    command.add_argument("--out", type=new_folder, default="world-pictures")
    command.add_argument("--rules", nargs="+", default=["dense", "fast", "paper"])
    command.add_argument("--view", type=positive, nargs=1, default=[64])
    command.add_argument("--number", type=number, default=0, help="examination clip")
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run one command; wrong arguments and missing files end with a sentence and status 2."""
    options = parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2


BEGAN = time.perf_counter()
if __name__ == "__main__":
    raise SystemExit(main())
