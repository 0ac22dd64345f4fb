"""patch on the GPU: our causal Wan, small, head size 128, bfloat16, through both kernels."""

import pytest
import torch
from gpu import needs_gpu, use_kernel

import lightforcing as lf
from lightforcing import _core
from lightforcing.models import CausalWan, Rollout, WanConfig

pytestmark = needs_gpu
SIZE, FRAMES, LAYERS = (16, 26), 12, 2  # 104 tokens a frame: a whole block and a short one
CONFIG = WanConfig.named("tiny", dim=256, ffn_dim=256, num_heads=2, num_layers=LAYERS)
CALLS = FRAMES // 3 * 5 * LAYERS  # five forwards a chunk
SPARSE = CALLS - 5 * LAYERS  # all but the first chunk's


@pytest.fixture(scope="module")
def model():
    return CausalWan(CONFIG, seed=0, device="cuda", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def dense(model):
    return video(model)


@pytest.fixture(params=["portable", "sm90"])
def kernel(request):
    use_kernel(request.param)
    yield request.param
    _core.force_kernel("auto")


def video(model, frames=FRAMES):
    return Rollout(model).generate(frames, size=SIZE, seed=0).latents


def test_sparsity_zero_is_bit_identical(model, dense):
    assert torch.equal(video(model), dense), "the dense model itself is not reproducible"
    with lf.patched(model, sparsity=0) as handle:
        assert torch.equal(video(model), dense)
    assert handle.stats()["dense"] == {"sparsity 0": CALLS}
    assert torch.equal(video(model), dense)


@pytest.mark.parametrize("preset", ["paper", "quality", "balanced", "fast"])
def test_presets_run_sparse_and_unpatch_restores(kernel, model, dense, preset):
    handle = lf.patch(model, preset, strict=True)
    sparse = video(model)
    stats = handle.stats()
    full = stats["dense"].get("all blocks kept", 0)  # in a last step, which has most of a chunk's
    assert (stats["calls"], stats["sparse_calls"]) == (CALLS, SPARSE - full)
    assert stats["dense"]["first chunk"] == CALLS - SPARSE
    assert full % LAYERS == 0 and full <= (0 if preset in ("paper", "fast") else 3 * LAYERS)
    assert torch.isfinite(sparse).all()
    assert torch.equal(sparse[:, :3], dense[:, :3]), "the first chunk is dense"
    assert not torch.equal(sparse, dense)
    assert torch.equal(video(model), sparse), "a second video differs"
    handle.unpatch()
    assert torch.equal(video(model), dense)


def test_a_rolling_window(kernel):
    config = WanConfig.named(
        "tiny", dim=256, ffn_dim=256, num_heads=2, num_layers=1, window_frames=6, sink_frames=1
    )
    model = CausalWan(config, seed=0, device="cuda", dtype=torch.bfloat16)
    with lf.patched(model, "paper-long", window=6, strict=True) as handle:
        latents = video(model, 18)
    assert torch.isfinite(latents).all()
    assert handle.stats()["sparse_calls"] == 5 * 5


def test_kept_means_change_nothing(model, monkeypatch):
    """Pooling the past again in every call gives the same video as the kept means."""
    from lightforcing.means import KeyMeans

    with lf.patched(model, "fast") as handle:
        kept = video(model)
        assert handle.stats()["means_bytes"] > 0
    monkeypatch.setattr(KeyMeans, "enter", lambda *arguments, **settings: None)
    with lf.patched(model, "fast") as handle:
        assert torch.equal(video(model), kept)
        assert handle.stats()["means_bytes"] == 0 and handle.stats()["sparse_calls"] == SPARSE


def test_the_sparse_video_follows_its_own_lists(model):
    """A patched call is select + attend of the very tensors that the layer attends."""
    seen = []
    import lightforcing.models.layers as layers

    with lf.patched(model, "fast", step_share=None) as handle:
        shim = layers.attention

        def spy(q, k, v, mask=None):
            out = shim(q, k, v)
            if k.shape[1] == FRAMES * 104:
                seen.append((q.clone(), k.clone(), v.clone(), out.clone()))
            return out

        layers.attention = spy
        try:
            video(model)
        finally:
            layers.attention = shim
        sparsity = handle.schedule(3, None).at(FRAMES)
    assert len(seen) == 5 * LAYERS
    for q, k, v, out in seen:
        expected = lf.attention(
            q, k, v, frame_tokens=104, sparsity=sparsity, score="mass", hierarchy=False
        )
        assert torch.equal(out, expected)


def test_timing_measures_and_changes_nothing(kernel, model):
    with lf.patched(model, "fast"):
        expected = video(model)
    with lf.patched(model, "fast", timing=True) as handle:
        assert torch.equal(video(model), expected)
        stats = handle.stats()
        print(handle.report())
    assert stats["sparse_ms"] > 0 and stats["dense_ms"] > 0
    assert stats["ms"] == pytest.approx(stats["sparse_ms"] + stats["dense_ms"])
    assert stats["attention_share"] is None  # the host's clock does not see a step's end
    assert all(chunk["ms"] > 0 for chunk in stats["chunks"])


def test_probe_measures_recall(kernel, model):
    with lf.patched(model, "fast", probe=32) as handle:
        video(model)
        stats = handle.stats()
    assert stats["density"] < stats["recall"] <= 1.001
    assert stats["recall_p5"] <= stats["recall"]


def test_float32_stays_dense_with_its_reason():
    model = CausalWan(CONFIG, seed=0, device="cuda", dtype=torch.float32)
    with lf.patched(model, "fast") as handle:
        video(model, 6)
    reasons = handle.stats()["dense"]
    assert handle.stats()["sparse_calls"] == 0 and reasons["dtype torch.float32"] == 2 * 5 * LAYERS
