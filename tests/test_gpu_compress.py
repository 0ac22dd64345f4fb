"""Block means on the GPU: the bits of the CPU's."""

import pytest
import torch
from gpu import draw, needs_gpu
from numerics import DTYPES

import lightforcing as lf

pytestmark = needs_gpu
BLOCKS = [4, 8, 16, 32, 64, 128]


def check(x, tokens, block, **options):
    means = lf.compress(x, tokens, block=block, **options)
    assert means.is_cuda and means.dtype == torch.float32
    assert torch.equal(means.cpu(), lf.compress(x.cpu(), tokens, block=block))
    return means


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, frames", [
    (1, 5), (37, 3), (60, 4), (64, 3), (78, 3), (880, 2), (1536, 2), (1560, 2),
])  # fmt: skip
def test_bits_of_the_cpu(dtype, tokens, frames):
    for dim in (64, 128) if tokens > 100 else (8, 40, 64, 128, 256):
        x = draw((2, frames * tokens, 3, dim), dtype, seed=tokens) + 0.5
        for block in BLOCKS:
            check(x, tokens, block)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_whole_chunk_of_a_model(dtype):
    check(draw((1, 3 * 1560, 12, 128), dtype, 1), 1560, 16)
    check(draw((1, 8 * 880, 24, 128), dtype, 2), 880, 64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_input(dtype):
    cache = draw((3, 400, 6, 80), dtype, 3)
    for view in (
        cache[:, 37:257, 1:5, 8:72],
        cache[1:2, ::2, ::3, :64][:, :165],
        cache[:, :220, :, 4:44],  # an address that 16 bytes do not divide
        cache.transpose(1, 2)[:, 2:, :110].transpose(1, 2)[..., :40],
        cache[:1].expand(4, -1, -1, -1)[:, :220],
    ):
        check(view, 55, 16)


def test_into_a_cache_frame_by_frame():
    tokens, per_frame = 70, 5
    x = draw((3, 6 * tokens, 2, 16), torch.float32, 4)
    whole = lf.compress(x.cpu(), tokens, block=16)
    cache = torch.full((3, 40, 4, 16), -7.0, device="cuda")
    for frame in range(6):
        new = x[:, frame * tokens : (frame + 1) * tokens]
        out = cache[:, 3 + frame * per_frame : 3 + (frame + 1) * per_frame, 1:3]
        assert lf.compress(new, tokens, block=16, out=out) is out
    assert torch.equal(cache[:, 3:33, 1:3].cpu(), whole)
    cache[:, 3:33, 1:3] = -7.0
    assert (cache == -7.0).all(), "wrote outside of the slice"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_special_value_stays_in_its_block(value):
    x = draw((1, 200, 2, 16), torch.float32, 5)
    clean = lf.compress(x, 100, block=32)
    x[0, 130, 1, 5] = value
    means = lf.compress(x, 100, block=32)
    odd = ~torch.isfinite(means)
    assert odd.sum() == 1
    assert torch.equal(means.masked_fill(odd, 0), clean.masked_fill(odd, 0))


def test_no_batch_and_no_frames():
    for shape in (0, 64, 2, 64), (1, 0, 2, 64):
        x = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
        assert lf.compress(x, 64).numel() == 0
