"""The profile of benchmarks/self_forcing.py: how long the GPU was busy, and with what."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from self_forcing import kind, profile_lines, summary  # noqa: E402


@pytest.mark.parametrize(
    "kernel, wanted",
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<cutlass::x> >", "attention"),
        ("void (anonymous namespace)::attend_sm90_kernel<128, 2>(CUtensorMap)", "attention"),
        ("void (anonymous namespace)::attend_kernel<64>(lf_attend_params)", "attention"),
        ("void (anonymous namespace)::pool_kernel<__nv_bfloat16, 16>(Pool)", "selection"),
        ("void lf::(anonymous namespace)::pair_sm90_kernel<128>(Pairs)", "selection"),
        ("void (anonymous namespace)::mean_scores_kernel(Scores)", "selection"),
        ("void (anonymous namespace)::choose_kernel<4>(Choose)", "selection"),
        ("nvjet_sm90_tst_192x192_64x4_1x2_h_bz_coopA_bias_TNT", "products"),
        ("sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "products"),
        ("void at::native::max_pool_forward_nchw<float>", "other"),
        ("void at::native::vectorized_elementwise_kernel<4, x>", "other"),
    ],
)
def test_kernels_by_what_they_are_for(kernel, wanted):
    assert kind(kernel) == wanted


def test_a_time_in_which_two_kernels_run_counts_once():
    events = [("nvjet_a", 100, 150), ("pool_kernel", 0, 10), ("attend_sm90_kernel", 8, 30),
              ("tail", 12, 20), ("nvjet_a", 160, 170)]  # fmt: skip
    got = summary(events)
    assert got["kernels"] == 5
    assert got["busy_ms"] == pytest.approx(0.030 + 0.050 + 0.010)
    assert got["kinds_ms"] == pytest.approx(
        {"attention": 0.022, "selection": 0.010, "products": 0.060, "other": 0.008}
    )
    assert got["longest"][0] == {"kernel": "nvjet_a", "calls": 2, "ms": pytest.approx(0.060)}


def test_the_table_of_the_profiles():
    row = summary([("attend_kernel", 0, 30_000), ("nvjet", 40_000, 60_000)]) | {"wall_ms": 100.0}
    lines = profile_lines({"dense": row})
    assert lines[0].split()[:5] == ["last", "chunk,", "ms", "wall", "GPU"]
    assert lines[1].split() == ["dense", "100.0", "50.0", "50%", "30.0", "0.0", "20.0", "0.0", "2"]
    assert profile_lines({}) == []
