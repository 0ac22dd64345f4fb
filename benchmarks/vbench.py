"""Sparse against dense on your own weights: paired videos, VBench scores, per-chunk likeness.

    python benchmarks/vbench.py plan     --prompts FILE [--texts FILE] [--samples 5] PLAN
    python benchmarks/vbench.py generate PLAN VIDEOS --checkout DIR --config FILE --checkpoint FILE
                                         [--arms dense balanced ...] [--frames 21]
    python benchmarks/vbench.py score    VIDEOS [--info VBench_full_info.json]
    python benchmarks/vbench.py table    VIDEOS
    python benchmarks/vbench.py compare  VIDEOS

`plan` writes which video is made of which text with which seed. Scored videos are named by the
prompts (`--prompts`, VBench's all_dimension.txt); the model may be given longer texts (`--texts`,
the file of the same order that comes with Self Forcing). `generate` makes every video of the plan
with a Self Forcing checkout, its checkpoint and `omegaconf` (`pip install omegaconf`),
dense and patched, each arm a folder of VIDEOS, the
same noise in every arm; what exists is not made again. An arm is `dense`, a preset, or settings as
`fast:sparsity=0.9,score=mean`. `score` runs VBench, where it is installed, and `table` prints each
arm's scores beside dense, with the paired difference over videos and a bootstrap 95 % interval.
`compare` needs no VBench: PSNR and SSIM (LPIPS where installed) of each chunk against dense. With
four steps a small change early gives another, equally good video: such a figure shows where videos
part, and only scores say whether that is worse.

Installing VBench: an environment of its own with `pip install vbench` (it pins old versions);
`score` and `table` need nothing else of this one but Python and NumPy.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
from _paired import difference, interval, show

LATENT_SIZE = (16, 60, 104)  # channels, rows and columns of Wan 2.1 at 480 x 832
FPS = 16

# Lowest and highest value of a dimension, with which VBench makes it a share; and what its total
# is a mean of. Source: VBench's scripts/constant.py and cal_final_score.py.
QUALITY = {
    "subject_consistency": (0.1462, 1.0),
    "background_consistency": (0.2615, 1.0),
    "temporal_flickering": (0.6293, 1.0),
    "motion_smoothness": (0.706, 0.9975),
    "aesthetic_quality": (0.0, 1.0),
    "imaging_quality": (0.0, 1.0),
    "dynamic_degree": (0.0, 1.0),
}
SEMANTIC = {
    "object_class": (0.0, 1.0),
    "multiple_objects": (0.0, 1.0),
    "human_action": (0.0, 1.0),
    "color": (0.0, 1.0),
    "spatial_relationship": (0.0, 1.0),
    "scene": (0.0, 0.8222),
    "appearance_style": (0.0009, 0.2855),
    "temporal_style": (0.0, 0.364),
    "overall_consistency": (0.0, 0.364),
}
HALF = "dynamic_degree"  # counts half
QUALITY_PARTS, PARTS = 4, 5  # of the total


# ---- which videos ----------------------------------------------------------------------------


def plan(prompts, texts=None, samples=5, seed=0):
    """Every video: its file's name, the text for the model and the seed of its noise.

    Args:
        prompts: lines that name the videos.
        texts: lines for the model, in the same order; None gives it the prompts.
        samples: videos a prompt.
        seed: another one gives other noise everywhere.

    Returns:
        A list of dicts; a prompt that comes twice (VBench's list has two such) is made once.

    Raises:
        ValueError: the two lists differ in length.
    """
    texts = prompts if texts is None else texts
    if len(texts) != len(prompts):
        raise ValueError(f"texts: expected {len(prompts)} lines as prompts has, got {len(texts)}")
    made = {}
    for prompt, text in zip(prompts, texts, strict=True):
        for index in range(samples):
            name = f"{prompt}-{index}.mp4".replace("/", "_")
            # Of the prompt, not of its place: a part of the list gives the same videos.
            draw = zlib.crc32(f"{seed} {index} {prompt}".encode())
            made.setdefault(name, {"file": name, "text": text, "seed": draw})
    return list(made.values())


def lines_of(path):
    return [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]


# ---- making them -----------------------------------------------------------------------------


def arm_settings(arm):
    """What ``lightforcing.patch`` gets for an arm, or None for dense.

    Raises:
        ValueError: a setting without a value.
    """
    preset, _, rest = arm.partition(":")
    if preset == "dense":
        return None
    settings = {"preset": preset}
    for part in filter(None, rest.split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"arm: expected name=value after the colon, got {part!r} in {arm!r}")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            settings[name] = value
    return settings


def check_arms(arms):
    """Raise ValueError for an arm that no patch takes."""
    from lightforcing.config import PRESETS, Config

    for arm in arms:
        settings = arm_settings(arm) or {"preset": "fast"}
        preset = settings.pop("preset")
        if preset not in PRESETS:
            raise ValueError(f"--arms: expected dense or one of {', '.join(PRESETS)}, got {arm!r}")
        settings.pop("strict", None)  # patch's own
        try:
            Config.preset(preset, **settings)
        except (TypeError, ValueError) as error:
            raise ValueError(f"--arms: {arm}: {error}") from None


def generate(pipeline, videos, folder, arms, frames=21, size=LATENT_SIZE, write=None, report=print):
    """Every planned video in every arm; a list of the files made.

    Args:
        pipeline: has ``inference(noise=, text_prompts=)`` and gives ``[B, F, 3, h, w]`` in [0, 1].
        videos: of :func:`plan`.
        folder: gets a folder for each arm, and ``report.txt`` in it.
        arms: as :func:`arm_settings` reads them.
        frames: latent frames.
        size: channels, rows and columns of a latent frame.
        write: called with a path and uint8 ``[F, h, w, 3]``; None writes MP4.
        report: called with a line as a video is done.
    """
    import torch

    import lightforcing as lf

    made, write = [], write or write_mp4
    device = _device_of(pipeline)
    for arm in arms:
        settings = arm_settings(arm)
        home = Path(folder) / arm.replace(":", "-").replace(",", "-")
        home.mkdir(parents=True, exist_ok=True)
        handle = None if settings is None else lf.patch(pipeline, **settings)
        try:
            for video in videos:
                path = home / video["file"]
                if path.exists():
                    continue
                # The pipeline's own draws come from the global generator.
                torch.manual_seed(video["seed"])
                draw = torch.Generator().manual_seed(video["seed"])
                noise = torch.randn(1, frames, *size, generator=draw).to(*device)
                with torch.no_grad():
                    out = pipeline.inference(noise=noise, text_prompts=[video["text"]])
                out = out[0] if isinstance(out, tuple) else out
                pixels = (255 * out[0].float().clamp(0, 1)).round().byte()
                unfinished = path.with_suffix(".part.mp4")
                write(unfinished, pixels.permute(0, 2, 3, 1).cpu().numpy())
                unfinished.replace(path)
                made.append(path)
                report(f"{arm}: {path.name}")
            if handle is not None:
                (home / "report.txt").write_text(handle.report() + "\n")
        finally:
            if handle is not None:
                handle.unpatch()
    return made


def _device_of(pipeline):
    from lightforcing.adapters import modules_of

    weights = (p for m in modules_of(pipeline) for p in m.parameters(recurse=False))
    first = next(weights)
    return first.device, first.dtype


def write_mp4(path, frames):
    import imageio

    with imageio.get_writer(path, fps=FPS, codec="libx264", quality=9, macro_block_size=8) as out:
        for frame in frames:
            out.append_data(frame)


def self_forcing(checkout, config, checkpoint):
    """The few-step pipeline of a Self Forcing checkout with its weights, on the GPU in bfloat16."""
    import torch

    sys.path.insert(0, str(checkout))
    from omegaconf import OmegaConf
    from pipeline import CausalInferencePipeline

    config = config if config.exists() else checkout / config
    merged = OmegaConf.merge(
        OmegaConf.load(checkout / "configs/default_config.yaml"), OmegaConf.load(config)
    )
    pipeline = CausalInferencePipeline(merged, device=torch.device("cuda"))
    weights = torch.load(checkpoint, map_location="cpu")
    part = next(n for n in ("generator_ema", "generator") if n in weights)
    pipeline.generator.load_state_dict(weights[part])
    return pipeline.to(device="cuda", dtype=torch.bfloat16)


# ---- VBench ----------------------------------------------------------------------------------


def score(folder, info=None, dimensions=None, run=subprocess.run):
    """Runs VBench on every arm, dimension by dimension; its exit code.

    Results that are there are not made again: ``<arm>.vbench/<dimension>``.
    """
    command = shutil.which("vbench")
    if command is None:
        print(
            "score: expected the command `vbench` on the PATH, got none; install it in an "
            "environment of its own with `pip install vbench`",
            file=sys.stderr,
        )
        return 2
    for arm in arms_of(folder):
        for dimension in dimensions or [*QUALITY, *SEMANTIC]:
            out = arm.with_suffix(".vbench") / dimension
            if any(out.glob("*eval_results.json")):
                continue
            out.mkdir(parents=True, exist_ok=True)
            asked = ["--videos_path", arm, "--dimension", dimension, "--output_path", out]
            asked += [] if info is None else ["--full_json_dir", info]
            done = run([command, "evaluate", *map(str, asked)])
            if done.returncode:
                print(f"score: {dimension} of {arm.name} failed", file=sys.stderr)
                return 1
    return 0


def arms_of(folder):
    """Folders of videos, dense first.

    Raises:
        ValueError: the folder is none.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"videos: expected a folder, got {folder}")
    found = [p for p in sorted(Path(folder).iterdir()) if p.is_dir() and p.suffix != ".vbench"]
    return sorted(found, key=lambda p: p.name != "dense")


def results(arm):
    """What VBench said of an arm: {dimension: (score, {file: score})}."""
    found = {}
    for path in sorted(Path(arm).with_suffix(".vbench").rglob("*eval_results.json")):
        for dimension, value in json.loads(path.read_text()).items():
            total, videos = (value + [[]])[:2] if isinstance(value, list) else (value, [])
            each = {
                Path(v["video_path"]).name: float(v["video_results"])
                for v in videos
                if isinstance(v, dict) and np.isscalar(v.get("video_results"))
            }
            found[dimension] = float(total), each
    return found


def totals(scores):
    """Quality, semantic and total score; None where a dimension is missing.

    Args:
        scores: {dimension: score} as VBench gives them.
    """

    def mean(parts):
        if any(d not in scores for d in parts):
            return None
        weights = {d: 0.5 if d == HALF else 1.0 for d in parts}
        shares = {d: (scores[d] - low) / (high - low) for d, (low, high) in parts.items()}
        return sum(weights[d] * shares[d] for d in parts) / sum(weights.values())

    quality, semantic = mean(QUALITY), mean(SEMANTIC)
    total = None
    if quality is not None and semantic is not None:
        total = (QUALITY_PARTS * quality + (PARTS - QUALITY_PARTS) * semantic) / PARTS
    return {"quality": quality, "semantic": semantic, "total": total}


def table(folder):
    """Lines: every dimension of every arm, and its paired difference to dense."""
    arms = {a.name: results(a) for a in arms_of(folder)}
    if "dense" not in arms or not arms["dense"]:
        raise FileNotFoundError(f"videos: expected VBench's results of the arm dense in {folder}")
    lines = []
    for name, found in arms.items():
        lines.append(f"{name}: scores x 100, difference to dense over the same videos [95 %]")
        for dimension in [d for d in (*QUALITY, *SEMANTIC) if d in found]:
            value, each = found[dimension]
            line = f"  {dimension:24}{100 * value:8.2f}"
            base = arms["dense"].get(dimension)
            if name != "dense" and base is not None:
                line += f"{100 * (value - base[0]):+8.2f}"
                both = sorted(each.keys() & base[1].keys())
                if both:
                    pairs = ([100 * side[v] for v in both] for side in (each, base[1]))
                    line += f"  {show(difference(*pairs))} of {len(both)} videos"
            lines.append(line)
        sums = totals({d: v for d, (v, _) in found.items()})
        lines += [f"  {n:24}{100 * v:8.2f}" for n, v in sums.items() if v is not None]
    return lines


# ---- likeness to dense, by chunk ---------------------------------------------------------------


def chunk_frames(frames, latent_chunk=3, stride=4):
    """Slices of the pixel frames of each chunk.

    The first latent frame is one pixel frame, every other one ``stride`` of them.
    """
    latent = 1 + -(-(frames - 1) // stride)
    ends = [1 + stride * (e - 1) for e in range(latent_chunk, latent, latent_chunk)] + [frames]
    return [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]


def likeness(video, dense, perceptual=None):
    """PSNR and SSIM, and LPIPS with ``perceptual``, of each chunk; dicts of lists.

    Args:
        video: uint8 ``[F, h, w, 3]``.
        dense: likewise.
        perceptual: a function of two ``[F, 3, h, w]`` batches in [-1, 1] that gives F distances.

    Raises:
        ValueError: the shapes differ.
    """
    import torch

    from lightforcing.world import metrics

    if video.shape != dense.shape:
        raise ValueError(f"video: expected the shape {dense.shape}, got {video.shape}")
    found = {"psnr": [], "ssim": []} | ({} if perceptual is None else {"lpips": []})
    for part in chunk_frames(len(video)):
        a, b = (
            torch.from_numpy(x[part].copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
            for x in (video, dense)
        )
        square = ((a - b) / 2).square().mean().clamp(min=1e-8)
        found["psnr"].append(float(-10 * square.log10()))
        found["ssim"].append(float(metrics.ssim(a[None], b[None]).mean()))
        if perceptual is not None:
            found["lpips"].append(float(perceptual(a, b).mean()))
    return found


def perceptual_distance():
    """LPIPS, where it is installed and its weights are there; else None."""
    try:
        import lpips
        import torch

        net = lpips.LPIPS(net="alex", verbose=False)
    except (ImportError, OSError):
        return None
    return lambda a, b: net(a, b).detach().flatten() if torch.is_tensor(a) else None


def read_video(path):
    import imageio

    return np.stack(imageio.mimread(path, memtest=False))[..., :3]


def compare(folder, read=read_video, perceptual=None):
    """Lines: likeness of every arm to dense by chunk, means over the videos that both have."""
    dense, *others = arms_of(folder) or [Path(folder)]
    if dense.name != "dense" or not others:
        raise FileNotFoundError(f"videos: expected a folder dense and another one in {folder}")
    lines = []
    for arm in others:
        both = sorted({p.name for p in arm.glob("*.mp4")} & {p.name for p in dense.glob("*.mp4")})
        if not both:
            raise FileNotFoundError(
                f"videos: expected mp4 files of the same names in {arm} and {dense}, got none"
            )
        each = [likeness(read(arm / n), read(dense / n), perceptual) for n in both]
        lines.append(f"{arm.name} against dense, {len(both)} videos, by chunk")
        for figure in each[0]:
            values = np.array([e[figure] for e in each])
            cells = "".join(f"{x:8.3f}" for x in values.mean(0))
            lines.append(f"  {figure:6}{cells}   all {show(interval(values.mean(1)), 3)}")
    return lines


def whole(least):
    """The type of an argument that is an integer from ``least``; this file does without torch."""

    def read(text):
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected an integer from {least}, got {text}")
        return int(text)

    return read


def planned(path):
    """The videos of a plan.

    Raises:
        ValueError: the file is none, or an empty one.
    """
    try:
        videos = json.loads(path.read_text())
        good = bool(videos) and all({"file", "text", "seed"} <= v.keys() for v in videos)
    except (ValueError, AttributeError, TypeError):
        good = False
    if not good:
        raise ValueError(f"plan: expected what `vbench.py plan` wrote, got {path}")
    return videos


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("plan", allow_abbrev=False)
    one.add_argument("plan", type=Path)
    one.add_argument("--prompts", type=Path, required=True)
    one.add_argument("--texts", type=Path)
    one.add_argument("--samples", type=whole(1), default=5)
    one.add_argument("--every", type=whole(1), default=1, help="take every Nth prompt only")
    one.add_argument("--seed", type=whole(0), default=0)
    one = commands.add_parser("generate", allow_abbrev=False)
    one.add_argument("plan", type=Path)
    one.add_argument("videos", type=Path)
    one.add_argument("--checkout", type=Path, required=True)
    one.add_argument("--config", type=Path, required=True)
    one.add_argument("--checkpoint", type=Path, required=True)
    one.add_argument("--arms", nargs="+", default=["dense", "balanced"])
    one.add_argument("--frames", type=whole(1), default=21, help="latent frames")
    for name in ("score", "table", "compare"):
        one = commands.add_parser(name, allow_abbrev=False)
        one.add_argument("videos", type=Path)
        if name == "score":
            one.add_argument("--info", type=Path, help="VBench_full_info.json")
            one.add_argument("--dimensions", nargs="+", choices=[*QUALITY, *SEMANTIC])
    args = parser.parse_args(argv)
    try:
        return _run(args)
    except (ValueError, OSError) as error:
        print(f"vbench {args.command}: {error}", file=sys.stderr)
        return 2


def _run(args):
    if args.command == "plan":
        texts = None if args.texts is None else lines_of(args.texts)
        prompts, every = lines_of(args.prompts), args.every
        if not prompts:
            raise ValueError(f"--prompts: expected a line a prompt, got none in {args.prompts}")
        if texts is not None and len(texts) != len(prompts):
            raise ValueError(
                f"--texts: expected {len(prompts)} lines as --prompts has, got {len(texts)}"
            )
        made = plan(prompts[::every], texts and texts[::every], args.samples, args.seed)
        args.plan.write_text(json.dumps(made, indent=1) + "\n")
        print(f"{len(made)} videos planned in {args.plan}")
    elif args.command == "generate":
        import _here  # noqa: F401  (the other commands need neither torch nor lightforcing)

        videos = planned(args.plan)
        if not args.checkout.is_dir():
            raise ValueError(f"--checkout: expected a folder, got {args.checkout}")
        if not args.checkpoint.is_file():
            raise ValueError(f"--checkpoint: expected a file, got {args.checkpoint}")
        check_arms(args.arms)
        if importlib.util.find_spec("omegaconf") is None:
            raise ValueError("generate needs omegaconf: pip install omegaconf")
        pipeline = self_forcing(args.checkout, args.config, args.checkpoint)
        generate(pipeline, videos, args.videos, args.arms, args.frames)
    elif args.command == "score":
        return score(args.videos, args.info, args.dimensions)
    elif args.command == "table":
        print("\n".join(table(args.videos)))
    else:
        print("\n".join(compare(args.videos, perceptual=perceptual_distance())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
