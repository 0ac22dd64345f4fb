"""The weights that come with the package: written in 8 bits a value, read back, checked by hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import torch

from ..models import CausalWan, WanConfig
from .model import new_model

FOLDER = Path(__file__).parent / "weights"
FILE, CARD, PAGE = "world.safetensors", "weights.json", "weights.md"
METADATA, SCALE = "lightforcing.world", ".scale"
MOST_BYTES = 8_000_000
LARGE = ("blocks.", "time_projection.")  # matrices in 8 bits; the rest stays in float16


def quantised(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Matrices of the blocks as int8 with a float16 scale for each row, all else in float16."""
    out = {}
    for name, weight in state.items():
        weight = weight.detach().float().cpu()
        if weight.dim() != 2 or not name.startswith(LARGE):
            out[name] = weight.half().contiguous()
            continue
        scale = (weight.abs().amax(1).clamp(min=1e-6) / 127).half()
        out[name] = (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        out[name + SCALE] = scale
    return out


def restored(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The float32 weights that :func:`quantised` left."""
    out = {}
    for name, weight in state.items():
        if not name.endswith(SCALE):
            scale = state.get(name + SCALE)
            out[name] = weight.float() if scale is None else weight * scale.float()[:, None]
    return out


def export(model: CausalWan, folder: str | os.PathLike, card: dict) -> CausalWan:
    """Writes weights and card; returns the model as it will be loaded, to examine that one.

    Args:
        model: trained weights.
        folder: where ``world.safetensors`` and ``weights.json`` go.
        card: what the card says besides name, size and hash of the file.

    Raises:
        ValueError: it is to go into the package, and is larger than the wheel allows.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    config = json.dumps(dataclasses.asdict(model.config))
    save_file(quantised(model.state_dict()), path, {METADATA: config})
    path.chmod(0o644)
    data = path.read_bytes()
    if len(data) > MOST_BYTES and FOLDER.resolve().parent in folder.resolve().parents:
        raise ValueError(f"model: expected at most {MOST_BYTES} bytes in 8 bits, got {len(data)}")
    facts = {"file": FILE, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / CARD).write_text(json.dumps(facts | card, indent=1) + "\n")
    return load_world(folder, device="cpu")


def load_world(
    folder: str | os.PathLike | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    untrained: bool = False,
) -> CausalWan:
    """The world model, ready for :func:`lightforcing.world.rollout`.

    Args:
        folder: of an export; None takes the weights of the package.
        device: None takes the GPU if there is one.
        dtype: None takes float16 on a GPU and float32 on a CPU.
        untrained: the same sizes with the weights that training begins with.

    Raises:
        FileNotFoundError: there are no weights in the folder.
        ValueError: the file is not the one that the card names.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype is None:
        dtype = torch.float16 if device.type == "cuda" else torch.float32
    if untrained:
        return new_model("narrow", device=device, dtype=dtype)
    from safetensors import safe_open

    folder = FOLDER if folder is None else Path(folder)
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(f"folder: no {FILE} in {folder}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    wanted = card(folder)["sha256"]
    if found != wanted:
        raise ValueError(f"folder: {FILE} has hash {found[:16]}, but its card says {wanted[:16]}")
    with safe_open(path, "pt") as file:
        config = WanConfig(**json.loads(file.metadata()[METADATA]))
        state = restored({name: file.get_tensor(name) for name in file.keys()})
    with torch.device("meta"):
        model = CausalWan(config, seed=None)
    model.load_state_dict(
        {name: value.to(device, dtype) for name, value in state.items()}, assign=True
    )
    return model.requires_grad_(False).eval()


def card(folder: str | os.PathLike | None = None) -> dict:
    """What is known of the weights: seed, recipe, log, GPU, gates."""
    return json.loads((Path(folder or FOLDER) / CARD).read_text())


def history(log: list[dict], at: dict, count: int) -> dict:
    """What the card says of a training run.

    Args:
        log: lines of its ``log.jsonl``.
        at: its counters at the end.
        count: weights of the model.
    """
    runs = [line for line in log if line.get("event") in ("start", "resume")]
    first = runs[0]
    command = f"python -m lightforcing.world train --model {first['model']} --seed {first['seed']}"
    return {
        "model": {"name": first["model"], "weights": count},
        "run": {
            "seed": first["seed"],
            "device": " and ".join(dict.fromkeys(run["device"] for run in runs)),
            "torch": " and ".join(dict.fromkeys(run["torch"] for run in runs)),
            "finished": at["stage"] == len(first["recipe"]),
            "wall": at["wall"],
            "steps": at["total"],
            "clips": at["clips"],
            "commands": [
                {
                    "command": f"{command} --stages "
                    + " ".join(f"{stage['seconds']:g}" for stage in run["recipe"]),
                    "from_step": run["at"]["total"],
                    "from_second": run["at"]["wall"],
                }
                for run in runs
            ],
            "recipe": runs[-1]["recipe"],
        },
        "notes": [],
        "gates": [],
    }


def page(facts: dict) -> str:
    """The card for people, in Markdown."""
    run, model = facts["run"], facts["model"]
    lines = [
        "# The world model's weights",
        "",
        f"`{facts['file']}`, {facts['bytes'] / 1e6:.2f} MB: {model['weights']:,} weights, the "
        "matrices of the blocks in 8 bits with a scale for each row, the rest in float16. "
        f"SHA-256 `{facts['sha256']}`.",
        "",
        f"Trained from nothing on one {run['device']} (torch {run['torch']}) in {run['wall']:.0f} "
        f"s, compiling and probes included: {run['steps']} steps, {run['clips']} clips, seed "
        f"{run['seed']}. `log.jsonl` beside this page is the log of:",
        "",
    ]
    for one in run["commands"]:
        lines.append(
            f"- `{one['command']}` from {one['from_second']:.0f} s, step {one['from_step']}"
        )
    lines += ["", *facts["notes"]]
    lines += [""] if facts["notes"] else []
    lines += ["| stage | view | seconds | sequences a step |", "|---|---|---|---|"]
    for number, stage in enumerate(run["recipe"], 1):
        lines.append(f"| {number} | {stage['view']} px | {stage['seconds']:g} | {stage['batch']} |")
    lines += ["", "The gates were examined on this very file, read back."]
    for result in facts["gates"]:
        lines += [
            "",
            f"## {result['view']} px, {result['clips']} clips",
            "",
            "| gate | bound | found | |",
            "|---|---|---|---|",
        ]
        for gate in result["gates"]:
            sign = "at least" if gate["least"] else "at most"
            lines.append(
                f"| {gate['name']} | {sign} {gate['bound']:g} | {gate['value']:.2f} | "
                f"{'holds' if gate['ok'] else 'FAILS'} |"
            )
        names = ("all", "bare", "back", "moving", "glyph_easy", "glyph_hard", "ssim", "drift")
        lines += ["", "| rollout | " + " | ".join(names) + " |", "|---" * 9 + "|"]
        for name, row in result["rows"].items():
            lines.append(f"| {name} | " + " | ".join(f"{row[key]:.2f}" for key in names) + " |")
    return "\n".join(lines) + "\n"
