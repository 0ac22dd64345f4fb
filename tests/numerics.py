"""How results are compared. Truth is `lightforcing.reference` in float64."""

import itertools

import numpy as np
import torch

from lightforcing import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def draw(*shapes, dtype=torch.float32, seed=0, size=1.0, shift=0.0):
    """Random tensors; `shift` moves them off zero mean, where relative errors would flatter."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(s, generator=generator) * size + shift).to(dtype) for s in shapes]


def draw_integers(*shapes, dtype=torch.float32, seed=0, bound=2):
    """Integers in [-bound, bound]: block means and their dot products are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(-bound, bound + 1, s, generator=generator).to(dtype) for s in shapes]


# ---- values --------------------------------------------------------------------------


def worst(ours, truth):
    """The element with the largest error, in words."""
    error = np.abs(ours - truth)
    where = np.unravel_index(np.argmax(error), error.shape)
    where_text = ", ".join(str(int(i)) for i in where)
    return f"at [{where_text}]: {ours[where]:.9g}, expected {truth[where]:.9g}"


def assert_specials_coincide(ours, truth):
    for name, test in ("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf):
        differ = test(ours) != test(truth)
        assert not differ.any(), (
            f"{name} at {np.argwhere(test(ours))[:3].tolist()}, "
            f"expected at {np.argwhere(test(truth))[:3].tolist()} ({differ.sum()} differ)"
        )


def assert_no_worse_than_torch(ours, truth, peer, *, dtype, size):
    """Error against float64 at most twice that of torch's own result, plus one rounding.

    `tiny` is one unit in the last place of `dtype` at `size` (the magnitude of what was
    summed): on a few elements torch's own error may be zero by luck.
    """
    ours, truth, peer = (reference.as_float64(x) for x in (ours, truth, peer))
    assert ours.shape == truth.shape
    assert_specials_coincide(ours, truth)
    finite = np.isfinite(truth) & np.isfinite(peer)
    if not finite.any():
        return
    zeros = np.zeros_like(truth)
    ours, truth, peer = (np.where(finite, x, zeros) for x in (ours, truth, peer))
    tiny = torch.finfo(dtype).eps * size
    error, allowed = np.abs(ours - truth).max(), 2 * np.abs(peer - truth).max() + tiny
    assert error <= allowed, (
        f"error {error:.3e}, allowed {allowed:.3e} (of which {tiny:.1e} for one rounding); "
        + worst(ours, truth)
    )


# ---- selections ----------------------------------------------------------------------


def assert_scores(ours, selection):
    """Each float32 score lies within section 2's tolerance of the float64 one."""
    ours = reference.as_float64(ours)
    assert ours.shape == selection.scores.shape
    assert_specials_coincide(ours, selection.scores)
    off = np.abs(ours - selection.scores) > selection.tolerance
    assert not off.any(), f"{off.sum()} scores off; " + worst(
        np.where(off, ours, 0), np.where(off, selection.scores, 0)
    )


def _choices(scores, tolerance, count):
    """Every set of `count` indices that scores this close could have put on top."""
    order = reference.ranking(scores)
    if count >= len(scores):
        return [set(range(len(scores)))]
    last_in, first_out = order[count - 1], order[count]
    sure, open_ = set(), []
    for rank, i in enumerate(order):
        cut = first_out if rank < count else last_in
        near = abs(scores[i] - scores[cut]) <= max(tolerance[i], tolerance[cut])
        if near:
            open_.append(i)
        elif rank < count:
            sure.add(i)
    sets = itertools.combinations(open_, count - len(sure))
    return [sure.union(chosen) for chosen in itertools.islice(sets, 256)]


def _frame_choices(truth, row):
    """Candidate frames that float32 frame scores could have chosen."""
    scores, past, keep = truth.frame_scores[row], truth.past, truth.plan.keep_frames
    if truth.forced is None or past <= keep:
        return [set(range(len(scores)))]
    sink, near = truth.forced
    others = range(sink, past - near)
    if keep == sink + near:
        chosen = [set()]
    else:
        by_frame = truth.tolerance[row].reshape(-1, truth.blocks_per_frame)
        # A mean of scores is as uncertain as its worst part, a sum of masses as their sum.
        tolerance = by_frame.sum(1) if truth.score == "mass" else by_frame.max(1)
        chosen = _choices(scores[others], tolerance[others], keep - sink - near)
    forced = set(range(len(scores))) - set(others)
    return [forced.union(others[i] for i in c) for c in chosen]


def _possible(ours, frames, truth, row):
    """Whether `ours` is a best choice among the blocks of `frames`, up to the tolerance."""
    scores, tolerance = truth.scores[row], truth.tolerance[row]
    per_frame = truth.blocks_per_frame
    blocks = np.array([f * per_frame + j for f in sorted(frames) for j in range(per_frame)])
    if not set(ours) <= set(blocks):
        return False
    order = blocks[reference.ranking(scores[blocks])]
    kept, rest = order[: len(ours)], order[len(ours) :]
    for block in set(ours) ^ set(kept):
        cut = kept[-1] if block in ours else rest[0]
        if not abs(scores[block] - scores[cut]) <= max(tolerance[block], tolerance[cut]):
            return False
    return True


def assert_selection(ours, truth, *, exact=False):
    """The lists agree as sets; a difference is only allowed between scores too close to tell."""
    ours = np.asarray(ours)
    assert ours.shape == truth.indices.shape, f"{ours.shape}, expected {truth.indices.shape}"
    assert (np.diff(ours, axis=-1) > 0).all(), "a list is not strictly ascending"
    assert ours.min() >= 0 and ours.max() < truth.plan.blocks
    for row in np.argwhere((ours != truth.indices).any(-1)):
        row = tuple(row)
        with np.errstate(invalid="ignore"):  # inf - inf: not near
            excused = not exact and any(
                _possible(ours[row], frames, truth, row) for frames in _frame_choices(truth, row)
            )
        assert excused, (
            f"row {tuple(map(int, row))}: kept {ours[row].tolist()}, "
            f"expected {truth.indices[row].tolist()}\nscores {truth.scores[row]}\n"
            f"frame scores {truth.frame_scores[row]}"
        )
