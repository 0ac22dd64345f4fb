"""Why an attention call stays dense: the reasons by name, and what the kernels cannot take."""

import functools
import inspect

import torch

# What somebody asked for, or what the method itself asks for; never an error in strict mode.
DISABLED = "LIGHTFORCING_DISABLE=1"
DENSE_CONTEXT = "lf.dense()"
TRAINING = "training forward"
ZERO = "sparsity 0"
DENSE_LAYER = "dense layer"
DENSE_STEP = "dense step"
FIRST_CHUNK = "first chunk"
DENSE_FRAMES = "dense_frames"
RECACHE = "several chunks without past frames (recache)"
NO_PAST = "no past frames"
ALL_KEPT = "all blocks kept"
PLANNED = frozenset(
    (DISABLED, DENSE_CONTEXT, TRAINING, ZERO, DENSE_LAYER, DENSE_STEP, FIRST_CHUNK, DENSE_FRAMES,
     RECACHE, NO_PAST, ALL_KEPT)
)  # fmt: skip

# Everything else is a reason that nobody asked for: warned of once, an error in strict mode.
NO_CALL = "forward with a cache but no attention call"
NO_GRID = "unknown frame size (no grid_sizes on the CPU, no frame_seqlen, no frame_tokens set)"
NO_TILES = "unknown rows and columns of a frame, which the selector asks for (set grid)"
GRIDS_DIFFER = "frame_tokens that the model contradicts"
NO_POSITION = "current_start that is not an integer"


class StrictError(RuntimeError):
    """A call would stay dense for a reason that nobody asked for, and ``strict`` is on."""


_PLAIN = (bool, int, float, str, tuple, torch.dtype)


def split(original, args, kwargs):
    """q, k, v of a dense call, and the reason in an argument that differs from its default."""
    if len(args) == 3 and not kwargs:
        return *args, None
    known = _defaults(original)
    names = list(known)
    given = dict(zip(names, args, strict=False)) | kwargs
    qkv = [given.pop(name, None) for name in names[:3]]
    if len(qkv) < 3 or len(args) > len(names) or any(x is None for x in qkv):
        return None, None, None, "arguments other than (q, k, v)"
    for name, value in given.items():
        if not _same(value, known.get(name)):
            shown = f"={value}" if isinstance(value, _PLAIN) else ""
            return *qkv, f"extra argument {name}{shown}"
    return *qkv, None


def _same(value, default):
    plain = isinstance(value, _PLAIN) and type(value) is type(default)
    return value is default or (plain and value == default)


@functools.cache
def _defaults(function):
    try:
        return {n: p.default for n, p in inspect.signature(function).parameters.items()}
    except (TypeError, ValueError):
        return {}


def unsupported(q, k, v):
    """What the kernels cannot take about these tensors, or None."""
    for name, x in zip("qkv", (q, k, v), strict=True):
        if type(x) is not torch.Tensor:
            return f"{name} of type {type(x).__name__}"
        if x.dim() != 4:
            return f"{name} with {x.dim()} dimensions"
        if x.is_neg():
            return f"{name}, a lazy negative view"
    if k.shape != v.shape or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        return f"shapes q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.dtype == k.dtype == v.dtype:
        return f"dtypes q {q.dtype}, k {k.dtype}, v {v.dtype}"
    if not q.device == k.device == v.device:
        return f"devices q {q.device}, k {k.device}, v {v.device}"
    kind, size = q.device.type, q.shape[3]
    if kind == "cpu":
        dtypes, fits = (torch.bfloat16, torch.float16, torch.float32), size % 8 == 0 <= 256 - size
    elif kind == "cuda" and cuda_kernels():
        dtypes, fits = (torch.bfloat16, torch.float16), size in (64, 128)
    else:
        return f"device {kind}, which this build has no kernels for"
    if q.dtype not in dtypes:
        return f"dtype {q.dtype}"
    if not fits:
        return f"head size {size}"
    if any(x.stride(3) != 1 for x in (q, k, v)):
        return "a last stride other than 1"
    if kind == "cuda" and not all(map(_in_16_bytes, (q, k, v))):
        return "strides or addresses that are not multiples of 16 bytes"
    return None


def _in_16_bytes(x):
    """Can the copy engines of a GPU take this 16-bit tensor as it lies?"""
    strides = zip(x.stride()[:3], x.shape, strict=False)
    return x.data_ptr() % 16 == 0 and all(step % 8 == 0 for step, size in strides if size > 1)


def not_frames(q_len, k_len, frame_tokens):
    """Why these lengths are not a chunk at the end of whole frames."""
    if q_len % frame_tokens or k_len % frame_tokens:
        return f"{q_len} query and {k_len} key tokens that are not whole frames of {frame_tokens}"
    return f"fewer keys ({k_len}) than queries ({q_len})"


@functools.cache
def cuda_kernels():
    """Has this build attention kernels for CUDA?"""
    from .build import info

    return bool(info().get("cuda_kernels"))
