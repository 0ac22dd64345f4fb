"""Wrong calls of the selectors: one sentence that names the argument."""

import pytest
import torch

from lightforcing import selectors
from lightforcing.selectors import Geometry

Q, K = torch.zeros(1, 40, 2, 16), torch.zeros(1, 120, 2, 16)
CALL = {"frame_tokens": 20, "sparsity": 0.5}


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: selectors.select("mass", Q, K, frame_tokens=0, sparsity=0.5), ValueError,
         "frame_tokens: expected 1 or more, got 0"),
        (lambda: selectors.select("mean", Q[0], K[0], **CALL), ValueError,
         "q: expected tensors q and k of the shapes"),
        (lambda: selectors.select("vmoba", Q[:, :, :1], K, grid=(4, 5), **CALL), ValueError,
         "q: expected tensors q and k of the shapes"),
        (lambda: selectors.select("mean", Q[..., :8], K, **CALL), ValueError,
         "q: expected tensors q and k of the shapes"),
        (lambda: selectors.select("mass", [1], [2], **CALL), ValueError,
         "q: expected tensors q and k of the shapes"),
        (lambda: selectors.make("sta", frames=1), TypeError,
         "selector: expected options of sta, window, sink_frames, fit, got frames"),
        (lambda: selectors.make("dense", window=1), TypeError,
         "selector: expected options of dense, none, got window"),
        (lambda: selectors.make("sta", window=(1, 2)), ValueError, "window: expected three"),
        (lambda: selectors.make("sta", window="abc"), ValueError, "window: expected three"),
        (lambda: selectors.make("sta", window=3), ValueError, "window: expected three"),
        (lambda: selectors.make("mass", guarantee="x"), ValueError, "guarantee: expected a share"),
        (lambda: selectors.select("sta", Q, K, grid="4x5", **CALL), TypeError,
         "grid: expected two integers, rows and columns, got '4x5'"),
        (lambda: selectors.select("sta", Q, K, grid=10, **CALL), TypeError, "grid: .* got 10"),
        (lambda: selectors.select("sta", Q, K, grid=(4, "5"), **CALL), TypeError,
         r"grid: .* got \(4, '5'\)"),
        (lambda: selectors.select("sta", Q, K, grid=(4, 5, 1), **CALL), TypeError, "grid: "),
        (lambda: selectors.metrics.measure(Q, K, K, [1]), TypeError,
         "lists: expected a BlockList, or a dict of some by name, got list"),
        (lambda: selectors.metrics.measure(Q, K, K, "mass"), TypeError, "lists: .* got str"),
        (lambda: Geometry(20, 2, 6, 4, block_k=0), ValueError, "block_k: expected 1 or more"),
        (lambda: Geometry(-20, 2, 6, 4), ValueError, "frame_tokens: expected 1 or more"),
    ],
)  # fmt: skip
def test_wrong_calls_are_one_sentence(call, error, words):
    with pytest.raises(error, match=words):
        call()
