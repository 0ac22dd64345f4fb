"""How good a list of blocks is: recall, its ratio to the oracle's, output error and density.

Everything comes from the exact softmax over all keys, in slabs of bounded memory, in plain torch:
so it does not depend on which kernel would run the list.
"""

from __future__ import annotations

from typing import Any

from ..blocks import BlockList
from .exact import block_mass, over_blocks, over_tokens, slabs
from .rank import as_torch, kind_of


def measure(
    q: Any,
    k: Any,
    v: Any,
    lists: BlockList | dict[str, BlockList],
    *,
    scale: float | None = None,
    oracle: BlockList | None = None,
) -> dict:
    """Quality of one list, or of several in one pass over the logits.

    Args:
        q: ``[B, Lq, H, D]``.
        k: ``[B, Lk, H, D]``.
        v: ``[B, Lk, H, D]``.
        lists: a list of blocks, or several by name, all of one geometry.
        scale: of the logits; None is ``D ** -0.5``.
        oracle: the oracle's list at the same budget; gives ``oracle_ratio``.

    Returns:
        A dict of plain floats (for several lists: by name): ``recall`` (share of the dense
        attention mass that the kept keys hold, mean over rows and heads), ``recall_p5`` (its 5th
        percentile over rows), ``oracle_ratio`` (recall over the oracle's; None without),
        ``rel_l1`` and ``rel_l2`` (``|O' - O| / |O|`` over the whole tensor), ``density``;
        ``recall_heads``, ``rel_l2_heads`` and ``error_heads`` (a head's part of the square of
        ``rel_l2``), lists of H floats.

    Raises:
        ValueError: a list is of another geometry, or v of another shape than k. TypeError: what
            is given is no list.
    """
    import torch

    single = isinstance(lists, BlockList)
    if not single and not isinstance(lists, dict):
        raise TypeError(
            f"lists: expected a BlockList, or a dict of some by name, got {type(lists).__name__}"
        )
    named = {"": lists} if single else dict(lists)
    if oracle is not None:
        named["\0oracle"] = oracle
    if not named or not all(isinstance(x, BlockList) for x in named.values()):
        raise TypeError(f"lists: expected a BlockList, or some by name, got {lists!r}")
    if k.shape != v.shape:
        raise ValueError(f"v: expected the shape {tuple(k.shape)} of k, got {tuple(v.shape)}")
    first = next(iter(named.values()))
    same = {_geometry(x) for x in named.values()} == {_geometry(first)}
    q, k, v = as_torch(q), as_torch(k), as_torch(v)
    if not same or (q.shape[1], k.shape[1]) != (first.q_len, first.k_len):
        raise ValueError("lists: expected lists of the geometry of q and k, got others")
    batch, heads = q.shape[0], q.shape[2]
    values = v.transpose(1, 2).flatten(0, 1)
    maps = {n: _map(x, q).flatten(0, 1) for n, x in named.items()}
    rows = {n: torch.zeros(batch * heads, first.q_len, device=q.device) for n in named}
    sums = {n: torch.zeros(2, batch * heads, dtype=torch.float64, device=q.device) for n in named}
    dense = torch.zeros(2, batch * heads, dtype=torch.float64, device=q.device)
    for some, part, p in slabs(q, k, first.block_q, scale):
        size = min(first.block_q, part.stop - part.start)
        begin = part.start // first.block_q
        blocks = slice(begin, begin + (part.stop - part.start) // size)
        here = values[some].to(p.dtype)
        out = p @ here
        dense[0, some] += out.abs().sum((1, 2), dtype=torch.float64)
        dense[1, some] += out.square().sum((1, 2), dtype=torch.float64)
        for name, kept in maps.items():
            kept = over_tokens(kept[some, blocks], first.frame_tokens, first.block_k)
            sparse = (p.unflatten(1, (-1, size)) * kept[:, :, None]).flatten(1, 2)
            share = sparse.sum(-1)
            rows[name][some, part] = share.float()
            sparse = sparse @ here / share.clamp_min(1e-30)[..., None]
            sums[name][0, some] += (sparse - out).abs().sum((1, 2), dtype=torch.float64)
            sums[name][1, some] += (sparse - out).square().sum((1, 2), dtype=torch.float64)
    best = named.pop("\0oracle", None)
    best = None if best is None else rows["\0oracle"].double().mean().item()
    result = {}
    for name, blocks in named.items():
        recalled = rows[name].double()
        mean = recalled.mean().item()
        by_head = sums[name].view(2, batch, heads).sum(1)
        base = dense.view(2, batch, heads).sum(1)
        result[name] = {
            "recall": mean,
            "recall_p5": _percentile(recalled.flatten(), 0.05),
            "oracle_ratio": None if best is None else mean / best,
            "rel_l1": (by_head[0].sum() / base[0].sum()).item(),
            "rel_l2": (by_head[1].sum() / base[1].sum()).sqrt().item(),
            "density": blocks.density,
            "recall_heads": recalled.view(batch, heads, -1).mean((0, 2)).tolist(),
            "rel_l2_heads": (by_head[1] / base[1]).sqrt().tolist(),
            "error_heads": (by_head[1] / base[1].sum()).tolist(),
        }
    return result[""] if single else result


def recall(q: Any, k: Any, blocks: BlockList, *, scale: float | None = None) -> Any:
    """Share of each query row's attention mass on the keys it keeps: float32 ``[B, H, Lq]``."""
    import torch

    tq, tk = as_torch(q), as_torch(k)
    kept = _map(blocks, tq).flatten(0, 1)
    out = torch.zeros(kept.shape[0], blocks.q_len, device=tq.device)
    for some, part, p in slabs(tq, tk, blocks.block_q, scale):
        size = min(blocks.block_q, part.stop - part.start)
        begin = part.start // blocks.block_q
        here = kept[some, begin : begin + (part.stop - part.start) // size]
        mass = over_blocks(p, blocks.frame_tokens, blocks.block_k)
        out[some, part] = (mass * here.repeat_interleave(size, 1)).sum(-1).float()
    return kind_of(out.unflatten(0, (tq.shape[0], tq.shape[2])), q)


def true_mass(
    q: Any,
    k: Any,
    *,
    frame_tokens: int,
    block_q: int = 128,
    block_k: int = 64,
    scale: float | None = None,
) -> Any:
    """Attention mass of each key block, summed over the query block's rows: ``[B, H, R, J]``."""
    mass = block_mass(
        as_torch(q), as_torch(k), frame_tokens=frame_tokens, block_q=block_q, block_k=block_k,
        scale=scale,
    )  # fmt: skip
    return kind_of(mass, q)


def _geometry(blocks):
    return blocks.q_len, blocks.k_len, blocks.frame_tokens, blocks.block_q, blocks.block_k


def _map(blocks, like):
    """Bool ``[B, H, R, J]`` on the device of ``like``, without a detour over the host."""
    import torch

    indices = as_torch(blocks.indices).to(like.device).long()
    counts = as_torch(blocks.counts).to(like.device)
    beyond = torch.arange(indices.shape[3], device=like.device) >= counts[..., None]
    shape = (*indices.shape[:3], blocks.blocks + 1)
    kept = torch.zeros(shape, dtype=torch.bool, device=like.device)
    return kept.scatter_(3, indices.masked_fill(beyond, blocks.blocks), True)[..., :-1]


def _percentile(values, share):
    """Nearest rank; torch.quantile refuses more than 16 million values."""
    return values.kthvalue(max(1, round(share * values.numel()))).values.item()
