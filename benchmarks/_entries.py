"""Recognise the chunk loops of a checkout by what their classes accept, and run them small.

A chunk loop is a class with an `inference...(noise, ...)` method and an `_initialize_kv_cache` of
its own or inherited. Its kind follows from parameters and methods, never from a repository's name.
The class, its model and its loop are the checkout's own; replaced are only weights (random), the
text encoder, the VAE and what `Checkout` had to stand in for.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import inspect
import io
import os
import re
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from _checkout import Checkout

SKIP = {"trainer", "train.py", "scripts", "tests", "demo.py", "app.py", "release_server.py"}
FULL_FRAME = (60, 104)  # latent height and width of a released frame, 1560 tokens
SCENE_CUT = "The scene transitions. "


@dataclass(frozen=True)
class Entry:
    """One chunk loop of a checkout: where it is and what kind of arguments it takes."""

    kind: str  # few-step, switch, rolling, sampler, shots, self-built
    module: str
    name: str
    method: str
    file: str

    def __str__(self):
        """Spell the loop as a dotted name."""
        return f"{self.module}.{self.name}.{self.method}"


@dataclass
class Size:
    """How large to build and how long to run."""

    layers: int = 2
    dim: int = 256
    heads: int = 2
    height: int = 16
    width: int = 26
    chunks: int = 7
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0
    text: int = 64  # channels of a prompt embedding (4096 in the released models)
    text_len: int = 512
    ffn: int = 0  # 0: twice dim
    freq: int = 64  # channels of a time embedding
    device: str = "cpu"

    @property
    def frame_tokens(self):
        """Tokens of a latent frame: patches of 2x2."""
        return self.height * self.width // 4


@dataclass
class Variant:
    """One way to run an entry: model keywords, pipeline settings, frames."""

    label: str
    model: dict = field(default_factory=dict)
    args: dict = field(default_factory=dict)
    chunk: int = 3
    first: int = 0  # frames of a lone first chunk, 0 for none


def _parameters(function):
    a = function.args
    return [x.arg for x in a.posonlyargs + a.args + a.kwonlyargs]


def recognise(checkout: Checkout):
    """Return (entries, reasons for the loops not driven), from the source alone."""
    classes, entries, left = {}, [], []
    for path in sorted(checkout.root.rglob("*.py")):
        relative = path.relative_to(checkout.root)
        if SKIP & set(relative.parts):
            continue
        try:
            tree = ast.parse(path.read_text())
        except SyntaxError:
            continue
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                methods = {m.name: m for m in node.body if isinstance(m, ast.FunctionDef)}
                bases = [b.id for b in node.bases if isinstance(b, ast.Name)]
                classes[(str(relative), node.name)] = (methods, bases, path.read_text())
    by_name = {name: value for (_, name), value in classes.items()}
    for (file, name), (methods, bases, source) in classes.items():
        loops = [
            m for m in methods if m.startswith("inference") and "noise" in _parameters(methods[m])
        ]
        inherited = {m for b in bases if b in by_name for m in by_name[b][0]}
        if not loops or "_initialize_kv_cache" not in {*methods, *inherited}:
            continue
        kind, reason = _kind(methods, _parameters(methods[loops[0]]), loops[0], source)
        module = file.removesuffix(".py").replace("/", ".")
        if not all(part.isidentifier() for part in module.split(".")):
            kind, reason = None, "its folder is a second checkout: give its path"
        if "/" in file and (checkout.root / file.split("/")[0] / "inference.py").exists():
            kind, reason = None, "its folder is a second checkout: give its path"
        entry = Entry(kind or "", module, name, loops[0], file)
        if kind:
            entries.append(entry)
        else:
            left.append(f"{entry}: {reason}")
    return entries, left


def _kind(methods, arguments, loop, source):
    init = _parameters(methods["__init__"]) if "__init__" in methods else []
    if "text_prompts_list" in arguments:
        return "switch", ""
    if "text_prompts_first" in arguments:
        return None, "one switch only; the loop with a list of switches is driven instead"
    if "sp_size" in source or "ulysses" in source.lower():
        return None, "sequence parallel, needs a process group"
    if loop == "inference_rolling_forcing":
        return "rolling", ""
    if "encode_prompt_blocks" in source:
        return "shots", ""
    if "_initialize_sample_scheduler" in methods:
        return "sampler", ""
    if init == ["self", "args", "device"]:
        return "self-built", ""
    if "text_prompts" in arguments:
        return "few-step", ""
    return None, f"arguments not known: {', '.join(arguments)}"


def variants(checkout: Checkout, entry: Entry):
    """Return the ways to run an entry that its wrapper and its shipped configs offer."""
    if entry.kind == "shots":
        for name in ("LLV2_TRITON_ROPE", "LLV2_TRITON_ADALN"):
            os.environ[name] = "0"
        checkout.note("LLV2_TRITON_ROPE=0, LLV2_TRITON_ADALN=0", "Triton kernels need a GPU")
    with checkout, silence():
        wrapper = getattr(checkout.load(entry.module), "WanDiffusionWrapper", None)
    accepts = set(inspect.signature(wrapper.__init__).parameters) if wrapper else set()
    configs = "\n".join(p.read_text() for p in checkout.root.glob("configs/*.y*ml"))
    relative = any("grid_sizes_kv" in inspect.getsource(m) for m in _causal(checkout))
    if entry.kind == "shots":
        return [Variant("window 32, sink 8, scene cut", {"local_attn_size": 32}, {}, 8)]
    if entry.kind in ("rolling", "self-built"):
        return [Variant("as shipped")]
    if "use_infinite_attention" in accepts:
        window = {"local_attn_size": 12, "sink_size": 3}
        infinity = {**window, "use_infinite_attention": True}
        found = [Variant("plain", window), Variant("infinity", infinity)]
        if entry.kind == "switch":
            for variant in found:
                variant.label += ", prompt switch, global sink"
                variant.args = {"global_sink": True}
            found.append(Variant("plain, prompt switch, no global sink", window))
        return found
    if relative:
        return [Variant("window 6, sink 1", {"local_attn_size": 6, "sink_size": 1})]
    found = [Variant("no window")]
    if entry.kind == "few-step":
        found.append(Variant("window 9, sink 3", {"local_attn_size": 9, "sink_size": 3}))
        found.append(Variant("lone first frame", {}, {"independent_first_frame": True}, first=1))
    if re.search(r"^num_frame_per_block: 1\s*$", configs, re.M):
        found.append(Variant("framewise", chunk=1))
    return found


def _causal(checkout):
    return [
        m for n, m in checkout.loaded().items() if n.rpartition(".")[2].startswith("causal_model")
    ]


@contextlib.contextmanager
def silence():
    """Swallow what the loops print; show it if they raise."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            yield
    except Exception:
        print(out.getvalue()[-2000:])
        raise


class TextEncoder(torch.nn.Module):
    """Stand-in: an embedding drawn from the prompt's hash, [B, length, C]."""

    def __init__(self, channels, dtype, length=512, device="cpu"):
        super().__init__()
        self.shape, self.kind, self.device = (length, channels), dtype, device

    def forward(self, text_prompts):
        """Return the conditioning dict for a list of prompts."""
        made = []
        for prompt in text_prompts:
            seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "little")
            made.append(torch.randn(self.shape, generator=torch.Generator().manual_seed(seed)))
        return {"prompt_embeds": torch.stack(made).to(self.device, self.kind)}


class Vae(torch.nn.Module):
    """Stand-in: the first three latent channels are the picture."""

    def decode_to_pixel(self, latent, use_cache=False):
        """Return [B, F, 3, h, w] in [-1, 1]."""
        return latent[:, :, :3].float().clamp(-1, 1)

    decode_to_pixel_chunk = decode_to_pixel


def cross_attention(q, k, v, q_lens=None, k_lens=None, **unused):
    """Stand-in for `flash_attention` without flash-attn: exact, [B, L, H, D], k_lens kept."""
    mask = None
    if k_lens is not None:
        place = torch.arange(k.shape[1], device=k.device)
        mask = place[None, None, None] < k_lens.view(-1, 1, 1, 1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).contiguous()


class OnCpu(torch.overrides.TorchFunctionMode):
    """Read a literal device="cuda" as the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Run the function with its device argument rewritten."""
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)
