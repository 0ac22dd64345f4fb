"""A patched call in one call of the core: the bits of its operators, and what it refuses."""

import itertools

import pytest
import torch

import lightforcing as lf
from lightforcing import _core
from lightforcing.step import Step

T, HEADS = 20, 2
BASE = {"keep_frames": 6, "sink_frames": 1, "near_frames": 2, "score": "mass", "hierarchy": False,
        "block_q": 32, "block_k": 16}  # fmt: skip


def draw(frames, dim=16, dtype=torch.float32, seed=0, batch=2):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, frames * T, HEADS, dim, generator=g).to(dtype)


def qkv(q_frames=3, k_frames=9, **more):
    lengths = (q_frames, k_frames, k_frames)
    return [draw(n, seed=i, **more) for i, n in enumerate(lengths)]


def step_of(q, k, v, sparsity=0.7, **changes):
    return Step(q, k, v, frame_tokens=T, sparsity=sparsity, **(BASE | changes))


@pytest.mark.parametrize("score, hierarchy", [("mean", True), ("mean", False), ("mass", False),
                                              ("lse", True)])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_bits_of_select_and_attend(score, hierarchy, dtype):
    q, k, v = qkv(dtype=dtype)
    chosen = BASE | {"score": score, "hierarchy": hierarchy}
    expected, lse, blocks = lf.attention(
        q, k, v, frame_tokens=T, sparsity=0.7, return_lse=True, return_blocks=True, **chosen
    )
    step = step_of(q, k, v, score=score, hierarchy=hierarchy)
    part = 16 if score == "mean" else 4
    fresh = lf.compress(k, T, block=part)
    for held in (None, 0, 4, 9):
        means = None
        if held is not None:
            means = torch.full((2, fresh.shape[1] + 3, HEADS, 16), torch.nan)  # room for more
            rows = held * -(-T // part)
            means[:, :rows] = fresh[:, :rows]
        out, mine, workspace = step.run(q, k, v, means, held or 0, want_lse=True)
        assert torch.equal(out, expected) and torch.equal(mine, lse)
        assert torch.equal(step.blocks(workspace).indices, blocks.indices)
        if means is not None:
            assert torch.equal(means[:, : fresh.shape[1]], fresh)
            assert means[:, fresh.shape[1] :].isnan().all()


def test_strided_inputs_and_contiguous_results():
    whole = torch.randn(2, 9 * T, HEADS, 3 * 16)
    q, k, v = whole[:, 6 * T :, :, :16], whole[..., 16:32], whole[..., 32:]
    out, lse, _ = step_of(q, k, v).run(q, k, v)
    assert lse is None and out.is_contiguous()
    assert torch.equal(out, lf.attention(q, k, v, frame_tokens=T, sparsity=0.7, **BASE))


def test_one_workspace_serves_the_steps_of_a_stream():
    spare = {}
    long, short = qkv(k_frames=12), qkv(k_frames=6)
    steps = [step_of(*x, spare=spare) for x in (short, long)]
    for i in (0, 1, 0, 1):
        steps[i].run(*(short, long)[i])
    assert len(spare) == 1 and next(iter(spare.values())).numel() == steps[1].words
    kept = next(iter(spare.values()))
    _, _, workspace = steps[1].run(*long, fresh=True)
    assert workspace is not kept and next(iter(spare.values())) is kept


def test_threads_do_not_share_a_workspace(monkeypatch):
    """While one step runs, a second one on the same stream finds no workspace and makes its own."""
    q, k, v = qkv()
    step, run, seen = step_of(q, k, v), _core.sparse_step, []

    def inside(*args):
        seen.append(args[5])
        if len(seen) == 1:
            step.run(q, k, v)
        run(*args)

    monkeypatch.setattr(_core, "sparse_step", inside)
    step.run(q, k, v)
    assert len(seen) == 2 and seen[0] is not seen[1]


# ---- facts -------------------------------------------------------------------------------


def test_facts_tell_kinds_of_calls_apart():
    q, k, v = qkv()
    same, address, capture = _core.facts(q, k, v, None)
    assert (address, capture) == (0, 0)
    assert _core.facts(q + 1, k.clone(), v, None)[0] == same  # values and addresses do not count
    wide = torch.cat([k, k], 3)[..., :16]
    others = [
        (q[:, :T], k, v), (q, k[:, T:], v[:, T:]), (q, wide, v), (q[:1], k[:1], v[:1]),
        tuple(x.half() for x in (q, k, v)), (q.half(), k, v), (q, k, v.transpose(2, 3)),
    ]  # fmt: skip
    kinds = {_core.facts(*x, None)[0] for x in others} | {same}
    assert len(kinds) == 1 + len(others)


def test_addresses_of_keys_inside_their_buffer():
    q, k, v = qkv()
    assert _core.facts(q, k, v, k)[1] == k.data_ptr()
    assert _core.facts(q, k[:, T:], v[:, T:], k)[1] == k[:, T:].data_ptr()
    assert _core.facts(q, k, v, k[:, T:])[1] == 0  # reaches out of it
    assert _core.facts(q, k, v, k.clone())[1] == 0
    assert _core.facts(q, k, v, "no tensor")[1] == 0
    assert _core.facts(q, k, v, torch.zeros(0))[1] == 0


def test_what_has_no_facts():
    q, k, v = qkv()
    for odd in (q.numpy(), q[0], q.int(), q.double(), q.to("meta"), None, 3, [q], q.to_sparse()):
        assert _core.facts(odd, k, v, None) is None
        assert _core.facts(q, odd, v, None) is None
        assert _core.facts(q, k, odd, None) is None


def test_forcing_a_kernel_makes_plans_stale():
    if not lf.info()["cuda_built"]:
        pytest.skip("this build has no CUDA half")
    q, k, v = qkv()
    step, before = step_of(q, k, v), _core.facts(q, k, v, None)[0]
    _core.force_kernel("auto")
    assert _core.facts(q, k, v, None)[0] != before
    with pytest.raises(ValueError, match="plan: .* another attention kernel of the process"):
        step.run(q, k, v)


# ---- what is refused ---------------------------------------------------------------------


def plan(**changes):
    values = {"frame_tokens": T, "sparsity": 0.7} | BASE
    q, k, v = qkv()
    order = ("frame_tokens", "sparsity", "keep_frames", "sink_frames", "near_frames", "score",
             "hierarchy", "block_q", "block_k")  # fmt: skip
    values |= {"q": q, "k": k, "v": v} | changes
    return _core.plan_step(*(values[n] for n in ("q", "k", "v", *order)))


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"frame_tokens": 21}, "q: expected whole frames of 21 tokens"),
        ({"k": draw(2), "v": draw(2)}, "q: expected 1 to Lk = 40 tokens, got 60"),
        ({"v": draw(8)}, r"v: dimension 1 \(Lk\) is 160, but k has Lk = 180"),
        ({"q": draw(3, dim=12), "k": draw(9, dim=12), "v": draw(9, dim=12)}, "head size"),
        ({"sparsity": 1.5}, r"sparsity: expected a number in \[0, 1\], got 1.5"),
        ({"sink_frames": 9}, "keep_frames: expected at least"),
        ({"score": "best"}, "score: expected 'mean', 'mass' or 'lse', got 'best'"),
        ({"block_q": 8}, "block_q: expected 16 to 128, got 8"),
        ({"block_k": 24}, "block_k: expected a power of two"),
    ],
)
def test_plans_are_checked(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        plan(**changes)


def test_plans_of_other_kinds():
    assert plan()[1] == max(1, int(0.3 * 18 + 1e-9))
    with pytest.raises(TypeError, match="q, k, v: expected 4-D float tensors of one device"):
        plan(q=draw(3).numpy())
    with pytest.raises(TypeError, match="k: expected float32 as q has, got float16"):
        plan(k=draw(9).half())
    with pytest.raises(TypeError, match="expected 12 arguments"):
        _core.plan_step(1)


def test_steps_check_what_they_write():
    q, k, v = qkv()
    core, kept, words = plan()
    good = {
        "plan": core, "q": q, "k": k, "v": v, "out": torch.empty_like(q),
        "workspace": torch.empty(words, dtype=torch.int32), "means": None, "held": 0, "lse": None,
    }  # fmt: skip
    _core.sparse_step(*good.values())
    means = torch.zeros(2, 9 * 5, HEADS, 16)
    bad = [
        ("plan", 3, ValueError, "PyCapsule"),
        ("q", q[:, :T], ValueError, "plan: .*, got another shape of q"),
        ("q", q.numpy(), ValueError, "plan: .*, got another kind of tensor of q, k, v"),
        ("k", k.half(), ValueError, "plan: .*, got another dtype of k"),
        ("out", torch.empty(2, 3 * T, HEADS, 8), ValueError,
         rf"out: expected shape \[2, {3 * T}, {HEADS}, 16\], .* got \[2, {3 * T}, {HEADS}, 8\]"),
        ("out", torch.empty(2, HEADS, 3 * T, 16).transpose(1, 2), ValueError, "out: expected"),
        ("out", torch.empty_like(q, dtype=torch.float16), TypeError, "out: expected float32"),
        ("out", q.numpy().copy(), TypeError, "out: expected a tensor as q .*ndarray"),
        ("workspace", torch.empty(words - 1, dtype=torch.int32), ValueError,
         rf"workspace: expected at least {words} words in a row, .* got \[{words - 1}\]$"),
        ("workspace", torch.empty(2 * words, dtype=torch.int32)[::2], ValueError,
         rf"workspace: .* got \[{words}\] with gaps$"),
        ("workspace", torch.empty(words), TypeError, "workspace: expected int32"),
        ("lse", torch.empty(2, HEADS, 3 * T - 1), ValueError,
         rf"lse: .* got \[2, {HEADS}, {3 * T - 1}\]"),
        ("means", means[:, 1:], ValueError,
         rf"\[2, at least 45, {HEADS}, 16\], got \[2, 44, {HEADS}, 16\]$"),
        ("means", means.double(), TypeError, "means: expected float32"),
        ("means", means[:1], ValueError, r"means: .* got \[1, 45"),
        ("means", means[..., :8], ValueError, r"means: .* 8\]$"),
    ]  # fmt: skip
    for name, value, error, sentence in bad:
        with pytest.raises(error, match=sentence):
            _core.sparse_step(*(good | {name: value}).values())
    for held, error in ((-1, ValueError), (10, ValueError), (1.0, TypeError)):
        with pytest.raises(error, match="held"):
            _core.sparse_step(*(good | {"means": means, "held": held}).values())


def test_a_long_time_of_many_kinds_keeps_nothing():
    """No reference is left behind by plans, facts, steps, or by those that fail."""
    import gc
    import tracemalloc

    sets = [qkv(), qkv(k_frames=6)]

    def once():
        for (q, k, v), sparsity in itertools.product(sets, (0.5, 0.8)):
            step_of(q, k, v, sparsity).run(q, k, v)
            _core.facts(q, k, v, k)
            with pytest.raises(ValueError):
                plan(block_q=8)

    for _ in range(3):
        once()
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(50):
        once()
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 20_000
