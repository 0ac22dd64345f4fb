"""Array kinds: torch, NumPy, and whatever else has ``__dlpack__``, without importing them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np


def is_torch(x: Any) -> bool:
    """True for a torch tensor; never imports torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def compiling() -> bool:
    """True while torch.compile traces; never imports torch."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.compiler.is_compiling()


def is_dual(x: Any) -> bool:
    """True for a torch tensor with a forward-mode tangent; :func:`is_torch` must hold."""
    forward_ad = sys.modules["torch.autograd.forward_ad"]
    if forward_ad._current_level < 0:  # no dual level is open: nearly always, and 50 ns
        return False
    return forward_ad.unpack_dual(x).tangent is not None


def ready(x: Any, name: str) -> Any:
    """The input itself, once the facts that DLPack does not carry are checked."""
    if not is_torch(x):
        return x
    if x.requires_grad and sys.modules["torch"].is_grad_enabled():
        raise ValueError(
            f"{name}: expected a tensor without grad, got one that requires it; lightforcing is "
            "for inference: call it under torch.no_grad() or detach first"
        )
    if is_dual(x):
        raise ValueError(
            f"{name}: expected a tensor without a forward-mode tangent, got a dual tensor; "
            "lightforcing is for inference: call it on torch.autograd.forward_ad.unpack_dual(...)"
            ".primal"
        )
    _check_plain(x, name)
    return x.detach() if x.requires_grad else x


def writable(out: Any) -> Any:
    """The output that a caller gave, checked likewise."""
    if is_torch(out):
        if out.requires_grad:
            raise ValueError("out: expected a tensor without grad, got one that requires it")
        if is_dual(out):
            raise ValueError("out: expected a tensor without tangent, got a dual tensor")
        _check_plain(out, "out")
    return out


def _check_plain(x: Any, name: str) -> None:
    if x.is_neg() or x.is_conj():
        raise ValueError(f"{name}: expected plain values, got a lazy negative or conjugate view")


def allocator(like: Any) -> Callable[[tuple[int, ...], str], Any]:
    """``empty(shape, dtype name)`` of the kind, and on the device, of ``like``."""
    if is_torch(like):
        torch = sys.modules["torch"]
        return lambda shape, dtype: torch.empty(
            shape, dtype=getattr(torch, dtype), device=like.device
        )
    return _numpy_empty


def _numpy_empty(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        raise TypeError("out: expected one to be given, since NumPy has no bfloat16 to return")
    return np.empty(shape, dtype)


def stream_of(x: Any) -> int | None:
    """The current CUDA stream of a producer without a DLPack exchange table, else None."""
    if hasattr(type(x), "__dlpack_c_exchange_api__"):
        return None  # the table names it
    if is_torch(x):
        return sys.modules["torch"].cuda.current_stream(x.device).cuda_stream if x.is_cuda else None
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(x, cupy.ndarray):
        return cupy.cuda.get_current_stream().ptr
    return None


def like(result: Any, model: Any) -> Any:
    """A NumPy result as the kind of ``model``: torch on its device, or its array namespace."""
    if not isinstance(result, np.ndarray) or isinstance(model, np.ndarray):
        return result
    if is_torch(model):
        return sys.modules["torch"].from_numpy(result).to(model.device)
    if hasattr(model, "__array_namespace__"):
        return model.__array_namespace__().from_dlpack(result)
    return result


def to_numpy(x: Any, name: str) -> np.ndarray:
    """A NumPy view of a tensor on the CPU; from other devices a copy."""
    if isinstance(x, np.ndarray):
        return x
    if is_torch(x):
        return x.detach().cpu().numpy()
    if hasattr(x, "__dlpack__"):
        return np.from_dlpack(x)
    raise TypeError(
        f"{name}: expected a torch tensor, a NumPy array or an object with __dlpack__, "
        f"got {type(x).__name__}"
    )
