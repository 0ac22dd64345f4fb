"""Rows of the GPU benchmark beyond one attention: selection, whole videos, host time."""

from __future__ import annotations

import contextlib
import statistics

import torch
import torch.nn.functional as F
from _gpu_rows import DEVICE, Truth, draw, qkv, sdpa
from timing import L2Flush, Work, host_us
from torch.nn.attention import SDPBackend

import lightforcing as lf
from lightforcing import report
from lightforcing.models import CausalWan, WanConfig


def torch_selection(g, q, k, k_means, kept):
    """The paper's scores in torch operations: pool the new tokens, product, top-k, sort."""
    rows, per_frame = -(-g.q_len // 128), -(-g.frame_tokens // 64)
    past = g.k_frames - g.q_frames

    def run():
        padded = F.pad(q[0].float(), (0, 0, 0, 0, 0, rows * 128 - g.q_len))
        q_means = padded.view(rows, 128, g.heads, g.dim).mean(1)
        new = k[0, past * g.frame_tokens :].float().view(g.q_frames, -1, g.heads, g.dim)
        new = F.pad(new, (0, 0, 0, 0, 0, per_frame * 64 - g.frame_tokens))
        new = new.view(g.q_frames * per_frame, 64, g.heads, g.dim).mean(1)
        means = torch.cat([k_means[0], new])
        scores = torch.einsum("rhd,jhd->hrj", q_means, means)
        return scores.topk(kept, dim=-1).indices.sort(dim=-1).values

    return run


def selection_group(g, *, density=0.10):
    """Selection with the past's means given: hot, right after q and k were written, and cold."""
    q, k, _ = qkv(g)
    new = k[:, (g.k_frames - g.q_frames) * g.frame_tokens :]
    flush, works = L2Flush(), []

    def write():  # one kernel that reads and writes q and the chunk's keys, as RoPE does
        torch._foreach_mul_([q, new], 1.0)

    for score, hierarchy in (("mean", True), ("mass", False)):
        part = 64 if score == "mean" else 16
        past = lf.compress(k[:, : k.shape[1] - new.shape[1]], g.frame_tokens, block=part)
        options = dict(
            frame_tokens=g.frame_tokens, sparsity=1 - density, score=score, hierarchy=hierarchy
        )

        def run(options=options, past=past):
            return lf.select_blocks(q, k, **options, k_means=past)

        def check(run=run, options=options):
            """Share of rows that differ from the CPU's; mean must agree, mass up to near ties."""
            mine = run().indices.cpu()
            theirs = lf.select_blocks(q.cpu(), k.cpu(), **options).indices
            differ = (mine != theirs).any(-1).float().mean().item()
            if differ > (0 if options["score"] == "mean" else 0.01):
                raise AssertionError(f"{differ:.2%} of the lists differ from the CPU's")
            return differ

        case = f"{g.name} select"
        works += [
            Work(case, f"{score} hot", run, check=check, host=True),
            Work(case, f"{score} after write", run, prelude=write),
            Work(case, f"{score} cold", run, prelude=flush),
            Work(
                case, f"{score} hot, pool all", lambda options=options: lf.select_blocks(
                    q, k, **options)
            ),
        ]  # fmt: skip
        if score == "mean":
            kept = max(1, int(density * g.k_frames * -(-g.frame_tokens // 64) + 1e-9))
            run = torch_selection(g, q, k, past, kept)
            works.append(Work(case, "mean hot, torch operations", run))
    works.append(Work(f"{g.name} select", "the write alone", write, note="in `after write` rows"))
    return works


def video_group(frames, *, presets=("paper", "fast"), chunk=3, tokens=1560, heads=12):
    """All self-attention calls of one layer and one pass over a video, selection included.

    Calls are those of a patched model: the chunk's own keys are pooled into a buffer of means,
    then selected from, then attended. The first chunk is dense: by our kernel, and in a row of
    its own by cuDNN, which a patched model runs there.
    """
    q, k, v = (draw(frames * tokens, heads, seed=i) for i in range(3))

    def slices(end):
        rows = slice((end - chunk) * tokens, end * tokens)
        return q[:, rows], k[:, : end * tokens], v[:, : end * tokens]

    ends = range(chunk, frames + 1, chunk)
    calls = [sdpa(*slices(end), SDPBackend.CUDNN_ATTENTION) for end in ends]
    pairs = heads * chunk * tokens * tokens * sum(ends)
    case = f"video {frames} frames"
    dense_flops = 4 * 128 * pairs
    works = [Work(case, "dense cuDNN", lambda: [call() for call in calls][-1], dense_flops)]
    works[0].check = Truth(*slices(frames)).check(works[0].run)
    for preset in presets:
        steps, kept, alone = _preset_calls(preset, frames, chunk, tokens, slices, k)
        flops = dense_flops * sum(kept) / sum(ends)

        def run(steps=steps):
            return [step() for step in steps][-1]

        def run_as_patched(steps=steps):
            return (calls[0](), *[step() for step in steps[1:]])[-1]

        def check(run=run, alone=alone):
            """The last chunk has the bits of select + attend without kept means."""
            if not torch.equal(run(), alone()):
                raise AssertionError("wrong result: kept means change the last chunk")
            return 0.0

        works.append(Work(case, f"{preset}, selection included", run, flops, check=check))
        if frames == 21:
            works.append(Work(case, f"{preset}, first chunk by cuDNN", run_as_patched, flops))
    for work in works:
        work.calls = 1 if frames > 21 else 3
    return works


def _preset_calls(preset, frames, chunk, tokens, slices, k):
    """One function a chunk, kept shares times frames, and the last chunk's reference."""
    config = lf.Config.preset(preset)
    rows = report.plan(config, num_frames=frames, frames_per_chunk=chunk, frame_tokens=tokens).rows
    part = config.block_k if config.score == "mean" else config.block_k // 4
    per_frame = -(-tokens // part)
    means = torch.empty(1, frames * per_frame, *k.shape[2:], device=DEVICE)
    lf.compress(k, tokens, block=part, out=means)

    def selection(row):
        return dict(frame_tokens=tokens, sparsity=row["sparsity"], **config.selection())

    def step(row):
        end = row["last_frame"] + 1
        q_, k_, v_ = slices(end)
        if row["kept"] >= row["blocks"]:
            return lambda: lf.block_sparse_attention(q_, k_, v_)
        fresh = means[:, (end - chunk) * per_frame : end * per_frame]
        options = selection(row)

        def run():
            lf.compress(k_[:, (end - chunk) * tokens :], tokens, block=part, out=fresh)
            blocks = lf.select_blocks(q_, k_, **options, k_means=means[:, : end * per_frame])
            return lf.block_sparse_attention(q_, k_, v_, blocks)

        return run

    def alone():
        return lf.attention(*slices(frames), **selection(rows[-1]))

    kept = [r["density"] * (r["last_frame"] + 1) for r in rows]
    return [step(row) for row in rows], kept, alone


# ---- host time ----------------------------------------------------------------------


def host_rows(rounds=9, calls=100):
    """Host microseconds of one attention layer's forward: plain, and patched (a sparse call).

    The three take turns, since a host's clock drifts; a row is the median of its rounds, and an
    `extra` row that of the differences within a round. The dense call that a sparse one replaces
    is taken off by that: torch's SDPA, whose own time is the last row.

    Returns:
        rows ``{"case", "kernel", "host_us"}``.
    """
    config = WanConfig.named("tiny", dim=256, num_heads=2, num_layers=1)
    model = CausalWan(config, seed=0, dtype=torch.bfloat16, device=DEVICE).eval()
    model.num_frame_per_block = 3
    size = (16, 32)  # 128 tokens a frame: the device is never what is waited for
    cache, layer = model.new_cache(12, *size), model.blocks[0].self_attn
    x = torch.randn(1, config.in_dim, 3, *size, device=DEVICE).to(torch.bfloat16)
    told = []

    def video():
        for start in (0, 3, 6, 9):
            model(x, 500.0, cache=cache, start_frame=start)

    def listen(*args, **kwargs):
        told[:] = [args, kwargs]
        return type(layer).forward(layer, *args, **kwargs)

    names = ("plain", "paper", "fast")
    spent = {name: [] for name in names}
    with torch.no_grad():
        layer.forward = listen
        video()
        del layer.forward
        args, kwargs = told
        for _ in range(rounds):
            for name in names:
                with contextlib.ExitStack() as stack:
                    if name != "plain":
                        handle = stack.enter_context(lf.patched(model, name, strict=True))
                        video()
                    spent[name].append(host_us(lambda: layer(*args, **kwargs), calls, rounds=1))
                    if name != "plain":
                        assert handle.stats()["sparse_calls"] > calls
    rows = [
        {"case": "host", "kernel": f"attention layer, {n}", "host_us": statistics.median(spent[n])}
        for n in names
    ]
    for name in names[1:]:
        extra = [a - b for a, b in zip(spent[name], spent["plain"], strict=True)]
        kernel = f"patched call, {name}: extra over dense"
        rows.append({"case": "host", "kernel": kernel, "host_us": statistics.median(extra)})
    q, k, v = (
        torch.randn(1, n, 2, 128, device=DEVICE).to(torch.bfloat16) for n in (384, 1536, 1536)
    )
    dense = host_us(sdpa_default(q, k, v))
    rows.append({"case": "host", "kernel": "torch SDPA call", "host_us": dense})
    return rows


def sdpa_default(q, k, v):
    def run():
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        return out.transpose(1, 2)

    return run
