"""Weights from files: Wan 2.1 and what is tuned from it, with the names their training left."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

from .config import PATCH, WanConfig
from .wan import CausalWan

WRAPPERS = re.compile(r"(^(model|module|generator)\.)|_fsdp_wrapped_module\.|_orig_mod\.|^module\.")
NESTED = ("generator_ema", "generator", "model", "state_dict")
METADATA = "lightforcing.config"


def load_wan(
    source: str | os.PathLike | Mapping,
    config: WanConfig | None = None,
    *,
    weights: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **changes,
) -> CausalWan:
    """A model with the weights of a file, a folder or a state dict.

    Args:
        source: a ``.pt``, ``.pth`` or ``.bin`` file of :func:`torch.save` (read with
            ``weights_only=True``), a ``.safetensors`` file, a folder of ``.safetensors`` files, or
            a mapping. Weights may lie under ``generator_ema``, ``generator``, ``model`` or
            ``state_dict`` (the first one found in this order), and their names may carry the
            prefixes of a wrapper, FSDP or :func:`torch.compile`.
        config: sizes; None reads them from the shapes. Shapes do not tell the number of heads:
            :func:`save_wan` stores it, otherwise heads of 128 channels are taken, as in every Wan.
        weights: key of the dict to take, such as ``"generator"``; None takes the first found.
        device: of the model; None leaves the weights where they were loaded, on the CPU.
        dtype: of the model; None takes that of the patch embedding.
        changes: fields of the configuration to set, as ``window_frames=12``.

    Raises:
        FileNotFoundError: there is no such file, or no ``.safetensors`` file in the folder.
        ValueError: the file type is not known, ``weights`` is not in the file, or the weights do
            not fit (missing, unexpected and wrongly shaped ones are named).
    """
    state, stored = _read(source)
    state = _unwrap(state, weights)
    if config is None:
        config = WanConfig(**stored) if stored else infer_config(state)
    config = dataclasses.replace(config, **changes)
    with torch.device("meta"):
        model = CausalWan(config, seed=None)
    _check(state, model.state_dict())
    dtype = state["patch_embedding.weight"].dtype if dtype is None else dtype
    # Copies, so that the file may be written again and the caller's tensors stay the caller's;
    # one by one, so that a file's weights are in memory only once.
    for name in list(state):
        state[name] = state[name].detach().to(device=device, dtype=dtype, copy=True)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


def save_wan(model: CausalWan, path: str | os.PathLike) -> None:
    """Writes the weights and the configuration to a ``.safetensors`` file."""
    from safetensors.torch import save_file

    state = {name: x.contiguous() for name, x in model.state_dict().items()}
    save_file(state, path, {METADATA: json.dumps(dataclasses.asdict(model.config))})


def infer_config(state: Mapping) -> WanConfig:
    """The configuration that the shapes of a state dict imply, heads being 128 channels wide.

    Raises:
        ValueError: a weight that is needed is missing, or the model is of another kind.
    """
    if "img_emb.proj.1.weight" in state or "blocks.0.cross_attn.k_img.weight" in state:
        raise ValueError("source: image-to-video weights (img_emb, k_img) are not supported")

    def shape(name):
        if name not in state:
            raise ValueError(f"source: not the weights of a Wan, {name} is missing")
        return state[name].shape

    patch = shape("patch_embedding.weight")
    if len(patch) != 5 or tuple(patch[2:]) != PATCH:
        raise ValueError(
            f"patch_embedding.weight: expected [dim, in_dim, 1, 2, 2], got {list(patch)}"
        )
    dim = patch[0]
    if dim % 128:
        raise ValueError(
            "config: heads of 128 channels were expected, and the weights have a width of "
            f"{dim}; give the configuration, shapes do not tell the number of heads"
        )
    layers = [re.match(r"blocks\.(\d+)\.", name) for name in state]
    found = dict(
        dim=dim,
        ffn_dim=shape("blocks.0.ffn.0.weight")[0],
        num_heads=dim // 128,
        num_layers=1 + max(int(m.group(1)) for m in layers if m),
        in_dim=patch[1],
        out_dim=shape("head.head.weight")[0] // 4,
        freq_dim=shape("time_embedding.0.weight")[1],
        cross_attention="text_embedding.0.weight" in state,
    )
    if found["cross_attention"]:
        found["text_dim"] = shape("text_embedding.0.weight")[1]
    if found["in_dim"] == 48:
        found["frames_per_chunk"] = 8
    return WanConfig(**found)


def _read(source) -> tuple[Mapping, dict | None]:
    """The mapping in ``source``, and the stored configuration if it has one."""
    if isinstance(source, Mapping):
        return source, None
    path = Path(source)
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"source: no .safetensors file in {path}")
        state, stored = {}, None
        for file in files:
            part, config = _read_safetensors(file)
            state.update(part)
            stored = stored or config
        return state, stored
    if not path.is_file():
        raise FileNotFoundError(f"source: no file {path}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in (".pt", ".pth", ".bin"):
        mapped = zipfile.is_zipfile(path)  # files of the oldest format cannot be mapped
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped), None
        except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
            raise ValueError(
                f"source: expected weights that torch.save wrote, and nothing else, got {path}"
            ) from error
    raise ValueError(
        f"source: expected a .pt, .pth, .bin or .safetensors file, got {path.suffix or path.name!r}"
    )


def _read_safetensors(path) -> tuple[dict, dict | None]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError("source: .safetensors files need `pip install safetensors`") from error
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(METADATA)
            return {name: file.get_tensor(name) for name in file.keys()}, text and json.loads(text)
    except SafetensorError as error:
        raise ValueError(f"source: expected a safetensors file, got {path} ({error})") from error


def _unwrap(state, weights) -> dict:
    """The flat dict of tensors inside ``state``, with the names of Wan 2.1."""
    if weights is not None:
        if not isinstance(state.get(weights), Mapping):
            raise ValueError(f"weights: no {weights!r} in the file, which has {_some(state)}")
        state = state[weights]
    while nested := next((n for n in NESTED if isinstance(state.get(n), Mapping)), None):
        state = state[nested]
    flat = {}
    for name, x in state.items():
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"source: expected a tensor for {name!r}, got {type(x).__name__}")
        while (plain := WRAPPERS.sub("", name)) != name:
            name = plain
        flat[name] = x
    return flat


def _check(state, wanted) -> None:
    """Raises one sentence about everything that does not fit."""
    faults = []
    if missing := [name for name in wanted if name not in state]:
        faults.append(f"{len(missing)} weights are missing ({_some(missing)})")
    if extra := [name for name in state if name not in wanted]:
        faults.append(f"{len(extra)} are not known ({_some(extra)})")
    wrong = [
        f"{name} {list(state[name].shape)} instead of {list(wanted[name].shape)}"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    if wrong:
        faults.append(f"{len(wrong)} have another shape ({_some(wrong)})")
    if faults:
        raise ValueError(f"source: the weights do not fit the configuration: {'; '.join(faults)}")


def _some(names, limit: int = 3) -> str:
    """The first few of ``names``, for a message."""
    names = [str(name) for name in names]
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
