"""The operators under torch on the GPU: registration, compile, graphs, streams, devices, memory."""

import os
import threading

import pytest
import torch
from gpu import draw, lists, needs_gpu, use_kernel

import lightforcing as lf
from lightforcing import (
    _core,
    doctor,
    selftest,
    torch_ops,  # noqa: F401  registers torch.ops.lightforcing
)

pytestmark = needs_gpu
T, Q, F, H, D = 150, 2, 9, 3, 128
OPTIONS = dict(frame_tokens=T, sparsity=0.7, keep_frames=4)
OUR_WARNINGS_ONLY = pytest.mark.filterwarnings(
    "default"
)  # what torch's compiler warns of is not ours


@pytest.fixture(params=["portable", "sm90"])
def kernel(request):
    use_kernel(request.param)
    yield request.param
    _core.force_kernel("auto")


def inputs(seed=0, frames=F, dtype=torch.bfloat16, heads=H):
    q = draw((1, Q * T, heads, D), dtype, seed)
    k, v = (draw((1, frames * T, heads, D), dtype, seed + i) for i in (1, 2))
    return q, k, v


def call(q, k, v, score="mean", k_means=None):
    out, lse = lf.attention(q, k, v, score=score, k_means=k_means, return_lse=True, **OPTIONS)
    return out, lse


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- registered operators -------------------------------------------------------------


@OUR_WARNINGS_ONLY
def test_opcheck():
    ops = torch.ops.lightforcing
    q, k, v = inputs()
    for block in (16, 64):
        torch.library.opcheck(ops.compress.default, (k, T, block))
    for score in ("mean", "mass", "lse"):
        rest = (T, 0.7, 4, 1, 2, score, True, 128, 64, None)
        torch.library.opcheck(ops.select_blocks.default, (q, k, None, *rest))
        means = lf.compress(k, T, block=64 if score == "mean" else 16)
        torch.library.opcheck(ops.select_blocks.default, (q, k, means, *rest))
    blocks = lf.select_blocks(q, k, **OPTIONS)
    lists = (blocks.indices, blocks.counts, T, 128, 64, None)
    torch.library.opcheck(ops.block_sparse_attention.default, (q, k, v, *lists))
    torch.library.opcheck(
        ops.block_sparse_attention.default, (q, k, v, None, None, 1, 128, 64, None)
    )


class Layer(torch.nn.Module):
    """Projections, our attention, a projection: what a compiler may fuse around it."""

    def __init__(self, score):
        super().__init__()
        self.score = score
        self.qkv, self.o = torch.nn.Linear(256, 3 * H * D), torch.nn.Linear(H * D, 256)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, H, D)).unbind(2)
        y = lf.attention(q[:, -Q * T :] * 1.0, k, v, score=self.score, **OPTIONS)
        return self.o(y.flatten(2)).relu()


@OUR_WARNINGS_ONLY
@pytest.mark.parametrize("score", ["mean", "mass"])
def test_compiled_without_a_graph_break(score):
    torch.manual_seed(0)
    layer = Layer(score).to("cuda", torch.bfloat16).requires_grad_(False)
    x = draw((1, F * T, 256), torch.bfloat16, 1)
    compiled = torch.compile(layer, fullgraph=True)
    # Fusion may round q and k otherwise, so lists may differ; most rows of the result agree.
    expected, got = layer(x), compiled(x)
    assert got.shape == expected.shape and torch.isfinite(got).all()
    error = (got.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)
    assert error.median() < 2e-2
    assert torch.equal(compiled(x), got)


@OUR_WARNINGS_ONLY
def test_compiled_operators_give_the_eager_bits():
    q, k, v = inputs()
    for score in ("mean", "mass", "lse"):
        compiled = torch.compile(lambda q, k, v, s=score: call(q, k, v, s), fullgraph=True)
        assert same(compiled(q, k, v), call(q, k, v, score))
    dense = torch.compile(lambda q, k, v: lf.block_sparse_attention(q, k, v), fullgraph=True)
    assert torch.equal(dense(q, k, v), lf.block_sparse_attention(q, k, v))
    means = torch.compile(lambda k: lf.compress(k, T, block=16), fullgraph=True)
    assert torch.equal(means(k), lf.compress(k, T, block=16))


# ---- CUDA graphs ----------------------------------------------------------------------


def captured(run):
    """A graph of run(), captured after a warm-up on a side stream, and its outputs."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


@pytest.mark.parametrize("score", ["mean", "mass", "lse"])
def test_graph_replays_equal_eager(kernel, score):
    lf.warmup()
    q, k, v = inputs()
    graph, result = captured(lambda: call(q, k, v, score))
    for seed in (0, 10, 20):
        for x, new in zip((q, k, v), inputs(seed), strict=True):
            x.copy_(new)
        expected = call(q, k, v, score)
        for x in result:
            x.fill_(float("nan"))
        for _ in range(3):
            graph.replay()
            assert same(result, expected)


def test_graph_of_a_whole_chunk(kernel):
    """Five passes of three layers: pool the chunk's keys into the kept means, select, attend."""
    lf.warmup()
    past = (F - Q) * T
    layers = [inputs(10 * i) for i in range(3)]
    per_frame = -(-T // 16)
    means = [torch.empty(1, F * per_frame, H, D, device="cuda") for _ in layers]
    for (_, k, _), kept in zip(layers, means, strict=True):
        lf.compress(k, T, block=16, out=kept)

    def chunk():
        results = []
        for _ in range(5):
            for (q, k, v), kept in zip(layers, means, strict=True):
                lf.compress(k[:, past:], T, block=16, out=kept[:, (F - Q) * per_frame :])
                results.append(call(q, k, v, "mass", kept)[0])
        return results

    graph, result = captured(chunk)
    for seed in (100, 200):
        for i, (q, k, v) in enumerate(layers):
            new = inputs(seed + 10 * i)
            q.copy_(new[0])
            k[:, past:].copy_(new[1][:, past:])
            v.copy_(new[2])
        for x in result:
            x.fill_(float("nan"))
        graph.replay()
        assert same(result, chunk())


# ---- streams, threads, devices ----------------------------------------------------------


def test_work_goes_to_the_current_stream():
    """Inputs that arrive late on a side stream are seen: nothing runs on another stream."""
    wanted, late = inputs(1), inputs(2)
    expected = call(*wanted)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # 25 ms
        for x, new in zip(late, wanted, strict=True):
            x.copy_(new)
        result = call(*late)
    side.synchronize()
    assert same(result, expected)


def test_several_streams_at_once(kernel):
    sets = [inputs(10 * i, frames=F + i) for i in range(4)]
    scores = ["mean", "mass", "lse", "mean"]
    expected = [call(*x, s) for x, s in zip(sets, scores, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in sets]
    results = [[] for _ in sets]
    for _ in range(25):
        for stream, x, score, kept in zip(streams, sets, scores, results, strict=True):
            with torch.cuda.stream(stream):
                kept.append(call(*x, score))
    torch.cuda.synchronize()
    for kept, wanted in zip(results, expected, strict=True):
        assert all(same(x, wanted) for x in kept)


def test_several_threads_at_once():
    sets = [inputs(10 * i, frames=F + i) for i in range(4)]
    expected = [call(*x) for x in sets]
    torch.cuda.synchronize()
    wrong = []

    def work(x, wanted):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                good = all(same(call(*x), wanted) for _ in range(25))
            wrong.extend([] if good else ["differs"])
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=a) for a in zip(sets, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_a_device_that_is_not_current():
    here = inputs(1)
    expected = call(*here)
    there = [x.to("cuda:1") for x in here]
    with torch.cuda.device(0):
        lf.warmup(1)
        result = call(*there)
        assert torch.cuda.current_device() == 0
        assert torch.cuda.mem_get_info(0)  # device 0 still answers
    assert all(x.device == torch.device("cuda:1") for x in result)
    torch.cuda.synchronize(1)
    for mine, wanted in zip(result, expected, strict=True):
        assert (mine.float().cpu() - wanted.float().cpu()).abs().max() < 2e-2
    assert torch.equal(
        lf.select_blocks(*there[:2], **OPTIONS).indices.cpu(),
        lf.select_blocks(*here[:2], **OPTIONS).indices.cpu(),
    )


def test_warmup_answers_for_devices_that_are_not_there():
    lf.warmup()
    lf.warmup(0)
    with pytest.raises(RuntimeError):
        lf.warmup(torch.cuda.device_count())
    assert torch.cuda.current_device() == 0
    assert torch.isfinite(call(*inputs())[0]).all()  # no sticky error is left behind


# ---- memory -----------------------------------------------------------------------------


def test_memory_is_flat_over_2000_calls(kernel):
    q, k, v = inputs()

    def calls(count):
        for i in range(count):
            call(q, k, v, ("mean", "mass")[i % 2])
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    before = calls(50)
    assert calls(2000) == before


# ---- refusals, in words -----------------------------------------------------------------


def refused(kind, sentence, run):
    with pytest.raises(kind) as caught:
        run()
    assert str(caught.value) == sentence


def test_an_input_that_requires_grad():
    q, k, v = inputs()
    for i, name in enumerate("qkv"):
        tensors = [q, k, v]
        tensors[i] = tensors[i].clone().requires_grad_()
        sentence = (
            f"{name}: expected a tensor without grad, got one that requires it; lightforcing is "
            "for inference: call it under torch.no_grad() or detach first"
        )
        refused(ValueError, sentence, lambda t=tensors: lf.block_sparse_attention(*t))
        with torch.no_grad():
            out = lf.block_sparse_attention(*tensors)
        assert not out.requires_grad and torch.equal(out, lf.block_sparse_attention(q, k, v))


def test_mixed_devices():
    q, k, v = inputs()
    refused(
        ValueError, "k: is on the CPU, but q is on cuda:0",
        lambda: lf.block_sparse_attention(q, k.cpu(), v),
    )  # fmt: skip
    refused(
        ValueError, "k: is on cuda:0, but q is on the CPU",
        lambda: lf.select_blocks(q.cpu(), k, **OPTIONS),
    )  # fmt: skip
    blocks = lf.select_blocks(q, k, **OPTIONS)
    other = lf.BlockList(
        blocks.indices.cpu(), blocks.counts.cpu(), Q * T, F * T, T, 128, 64
    )  # fmt: skip
    refused(
        ValueError, "indices: is on the CPU, but q is on cuda:0",
        lambda: lf.block_sparse_attention(q, k, v, other),
    )  # fmt: skip


def test_dtypes_and_head_sizes_without_a_kernel():
    q, k, v = inputs(dtype=torch.float32)
    refused(
        NotImplementedError,
        "block_sparse_attention: on CUDA q, k and v are float16 or bfloat16, got float32 (the CPU "
        "takes it)",
        lambda: lf.block_sparse_attention(q, k, v),
    )
    q, k, v = (x[..., :72].to(torch.bfloat16).contiguous() for x in (q, k, v))
    refused(
        NotImplementedError, "block_sparse_attention: on CUDA D is 64 or 128, got 72",
        lambda: lf.block_sparse_attention(q, k, v),
    )  # fmt: skip


def test_a_forced_kernel_says_why_it_cannot_run():
    use_kernel("sm90")
    try:
        q, k, v = inputs()
        blocks = lists([3], 1, H, Q * T, F * T, T, 64, 16)
        refused(
            NotImplementedError,
            "the Hopper kernel takes query blocks of 64 or 128 rows with key blocks of 64 tokens",
            lambda: lf.block_sparse_attention(q, k, v, blocks),
        )
    finally:
        _core.force_kernel("auto")
    assert torch.isfinite(lf.block_sparse_attention(q, k, v, blocks)).all()
    with pytest.raises(ValueError):
        _core.force_kernel("fastest")


def test_the_doctor_names_the_kernel_that_runs():
    rows = doctor.gpus()
    assert len(rows) == torch.cuda.device_count()
    hopper = torch.cuda.get_device_capability(0) == (9, 0)
    assert torch.cuda.get_device_name(0) in rows[0]["found"]
    assert (_core.why_portable(0) is None) == hopper
    if not os.environ.get("LIGHTFORCING_KERNEL"):
        assert rows[0]["state"] == "ok"
        assert ("attention runs on the Hopper kernel" in rows[0]["found"]) == hopper


def test_the_selftest_passes_on_the_gpu(monkeypatch):
    monkeypatch.setattr(selftest, "CHECKS", {})
    rows = selftest.run(seconds=5)
    kernels = selftest.cuda_kernels()
    assert {r["isa"] for r in rows} == {"cuda", *kernels}
    assert len(rows) == 3 + 2 * len(kernels)
    assert [r for r in rows if not r["ok"]] == []


def test_calls_after_a_refusal_are_right():
    q, k, v = inputs()
    expected = call(q, k, v)
    with pytest.raises(NotImplementedError):
        lf.block_sparse_attention(q.float(), k.float(), v.float())
    assert same(call(q, k, v), expected)
