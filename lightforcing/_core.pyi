"""Types of the compiled module. Its functions take positional arguments only."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Empty = Callable[[tuple[int, ...], str], Any]

def cag_schedule(
    chunk_ends: NDArray[np.int64],
    dense_frames: int,
    window: int,
    sparsity: float,
    base: float,
    law: str,
    /,
) -> tuple[NDArray[np.float64], float]: ...
def compress(
    x: Any,
    out: Any | None,
    empty: Empty,
    frame_tokens: int,
    block: int,
    stream: int | None,
    /,
) -> Any: ...
def select_plan(
    q_frames: int,
    k_frames: int,
    frame_tokens: int,
    block_k: int,
    sparsity: float,
    keep_frames: int,
    hierarchy: bool,
    /,
) -> tuple[int, int, int]: ...
def select_blocks(
    q: Any,
    k: Any,
    k_means: Any | None,
    empty: Empty,
    frame_tokens: int,
    sparsity: float,
    keep_frames: int,
    sink_frames: int,
    near_frames: int,
    score: str,
    hierarchy: bool,
    block_q: int,
    block_k: int,
    scale: float | None,
    want_scores: bool,
    stream: int | None,
    /,
) -> tuple[Any, Any | None, int, int, int]: ...
def block_sparse_attention(
    q: Any,
    k: Any,
    v: Any,
    blocks: tuple[Any, Any, int, int, int, int, int] | None,
    out: Any | None,
    empty: Empty,
    scale: float | None,
    want_lse: bool,
    stream: int | None,
    /,
) -> Any: ...
def facts(q: Any, k: Any, v: Any, keys: Any | None, /) -> tuple[bytes, int, int] | None: ...
def plan_step(
    q: Any,
    k: Any,
    v: Any,
    frame_tokens: int,
    sparsity: float,
    keep_frames: int,
    sink_frames: int,
    near_frames: int,
    score: str,
    hierarchy: bool,
    block_q: int,
    block_k: int,
    /,
) -> tuple[Any, int, int]: ...
def sparse_step(
    plan: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    workspace: Any,
    means: Any | None,
    held: int,
    lse: Any | None,
    /,
) -> None: ...
def lists_to_bool(
    indices: NDArray[np.int32], counts: NDArray[np.int32], blocks: int, /
) -> NDArray[np.bool_]: ...
def lists_to_csr(
    indices: NDArray[np.int32], counts: NDArray[np.int32], /
) -> tuple[NDArray[np.int64], NDArray[np.int32]]: ...
def bool_to_lists(mask: NDArray[np.bool_], /) -> tuple[NDArray[np.int32], NDArray[np.int32]]: ...
def threads() -> int: ...
def set_threads(threads: int, /) -> None: ...
def isa() -> str: ...
def force_isa(name: str, /) -> None: ...
def cuda_warmup(device: int, /) -> None: ...
def is_disabled() -> bool: ...
def force_kernel(name: str, /) -> None: ...
def why_portable(device: int, /) -> str | None: ...
def build_info() -> dict[str, Any]: ...
