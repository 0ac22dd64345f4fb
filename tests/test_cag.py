"""Chunk-Aware Growth: the published schedules, and what holds for every schedule."""

import copy
import pickle

import numpy as np
import pytest
from cases import generated
from hypothesis import strategies as st

import lightforcing as lf
from lightforcing import reference

LAWS = ["linear", "exponential", "constant", "count"]

PUBLISHED = [  # arguments, schedule of 21 frames in chunks of 3
    (dict(sparsity=0.88, base=0.98), [0, 0.8270, 0.8551, 0.8718, 0.8832, 0.8917, 0.8982]),
    (dict(sparsity=0.80, base=0.90), [0, 0.7470, 0.7751, 0.7918, 0.8032, 0.8117, 0.8182]),
    (
        dict(sparsity=0.88, base=0.98, law="exponential"),
        [0, 0.8308, 0.8564, 0.8720, 0.8829, 0.8909, 0.8973],
    ),
    (
        dict(sparsity=0.88, law="count"),
        [0, 0.7300, 0.8200, 0.8650, 0.8920, 0.9100, 0.9229],
    ),
]


@pytest.mark.parametrize("arguments, expected", PUBLISHED)
def test_published_schedules(arguments, expected):
    np.testing.assert_allclose(lf.cag_schedule(21, 3, **arguments), expected, atol=5e-5, rtol=0)


def test_clipped_schedule_is_solved_again():
    s = lf.cag_schedule(21, 3, sparsity=0.30, base=0.95)
    np.testing.assert_allclose(s, [0, 0, 0.133, 0.243, 0.317, 0.373, 0.415], atol=1e-3)
    assert np.average(s[1:], weights=range(6, 22, 3)) == pytest.approx(0.30, abs=1e-12)


def test_published_long_schedule():
    s = lf.cag_schedule(63, 3, sparsity=0.85, base=0.95, window=12)
    assert s.shape == (21,) and s.dtype == np.float64
    np.testing.assert_allclose(s[[1, 20]], [0.7345, 0.8835], atol=5e-5)


@pytest.mark.parametrize(
    "frames, arguments, expected",
    [
        (21, dict(sparsity=0.88, base=0.98), [25, 32, 38, 43, 48, 53]),
        (21, dict(sparsity=0.80, base=0.90), [37, 50, 62, 73, 84, 95]),
        (63, dict(sparsity=0.85, base=0.95, window=12), [39, 50, 60, 55, 52, 49, 47]),
    ],
)
def test_published_kept_blocks(frames, arguments, expected):
    schedule = lf.cag_schedule(frames, 3, **arguments)
    window = arguments.get("window", frames)
    plans = [
        lf.plan_selection(3, min(3 * c + 3, window), 1560, sparsity=schedule[c])
        for c in range(1, 1 + len(expected))
    ]
    assert [kept for _, kept, _ in plans] == expected
    assert [blocks for blocks, _, _ in plans] == [
        25 * min(3 * c + 3, window) for c in range(1, 1 + len(expected))
    ]


def test_kept_blocks_do_not_fall_one_short():
    # (1 - 0.8) * 360 is 71.99999999999999 in binary.
    assert lf.plan_selection(3, 15, 24 * 64, sparsity=0.8)[:2] == (360, 72)
    assert lf.plan_selection(1, 5, 64, sparsity=1.0)[1] == 1


def test_defaults():
    by_default = lf.cag_schedule()
    assert by_default.shape == (7,)
    np.testing.assert_array_equal(by_default, lf.cag_schedule(21, 3, sparsity=0.80, base=0.90))
    assert len(lf.cag_schedule(None, 3)) == 7
    assert len(lf.cag_schedule(None, 3, window=12)) == 21
    np.testing.assert_array_equal(
        lf.cag_schedule(sparsity=0.95), lf.cag_schedule(sparsity=0.95, base=1.0)
    )


def test_zero_sparsity_is_dense():
    for law in LAWS:
        assert not lf.cag_schedule(21, 3, sparsity=0, law=law).any()
        assert not lf.cag_schedule(21, 3, sparsity=0, base=1.0, law=law).any()


def test_base_equal_to_the_target_is_flat():
    for law in "linear", "exponential":
        s = lf.cag_schedule(21, 3, sparsity=0.7, base=0.7, law=law)
        np.testing.assert_allclose(s, [0] + 6 * [0.7], atol=1e-12)


def test_first_chunks_of_any_length():
    lone_first_frame = lf.cag_schedule(sparsity=0.8, chunk_ends=[1, 4, 7, 10, 13])
    # One frame precedes the second chunk, fewer than a chunk's three: dense as well.
    assert (lone_first_frame[:2] == 0).all() and (lone_first_frame[2:] > 0.7).all()
    framewise = lf.cag_schedule(frames_per_chunk=1, sparsity=0.8, chunk_ends=range(1, 22))
    assert framewise[0] == 0 and (framewise[1:] > 0).all()
    np.testing.assert_array_equal(framewise, lf.cag_schedule(21, 1, sparsity=0.8))
    held_back = lf.cag_schedule(21, 1, sparsity=0.8, dense_frames=5)
    assert (held_back[:5] == 0).all() and (held_back[5:] > 0).all()
    np.testing.assert_array_equal(
        lf.cag_schedule(21, 3, sparsity=0.8),
        lf.cag_schedule(sparsity=0.8, chunk_ends=range(3, 22, 3)),
    )


@st.composite
def plans(draw):
    per_chunk = draw(st.integers(1, 6))
    if draw(st.booleans()):
        ends = np.cumsum(draw(st.lists(st.integers(1, 7), min_size=1, max_size=30))).tolist()
        where = dict(chunk_ends=ends)
    else:
        where = dict(num_frames=draw(st.integers(1, 90)))  # the last chunk may be short
    sparsity = draw(st.sampled_from([0.0, 0.5, 0.88, 0.999]) | st.floats(0, 0.99))
    return dict(
        **where,
        frames_per_chunk=per_chunk,
        sparsity=sparsity,
        base=draw(st.none() | st.floats(sparsity, 1.0)),
        window=draw(st.none() | st.integers(per_chunk, 40)),
        law=draw(st.sampled_from(LAWS)),
        dense_frames=draw(st.none() | st.integers(0, 9)),
    )


def _ends(plan):
    frames, per_chunk = plan.get("num_frames", 0), plan["frames_per_chunk"]
    whole = np.minimum(np.arange(0, frames, per_chunk) + per_chunk, frames)
    return np.array(plan.get("chunk_ends", whole))


def _weights(plan):
    """Resident frames of each chunk, zero where it is dense by rule."""
    ends = _ends(plan)
    dense = plan["frames_per_chunk"] if plan["dense_frames"] is None else plan["dense_frames"]
    before = np.append(0, ends[:-1])
    resident = np.minimum(ends, plan["window"] or ends)
    return np.where((before > 0) & (before >= dense), resident, 0)


@generated(300, plan=plans())
def test_any_schedule(plan):
    s, weights = lf.cag_schedule(**plan), _weights(plan)
    # Bisection in the reference leaves the parameter, and with it s, within 1e-9.
    np.testing.assert_allclose(s, reference.cag_schedule(**plan), atol=1e-9, rtol=0)
    assert ((s >= 0) & (s <= 1)).all()
    assert (s[weights == 0] == 0).all()
    if weights.any():
        assert np.average(s, weights=weights) == pytest.approx(plan["sparsity"], abs=1e-9)
        assert (np.diff(s[weights > 0]) >= -1e-12).all()


@generated(100, plan=plans())
def test_law_count_keeps_the_same_number_of_blocks(plan):
    plan["law"] = "count"
    s, weights = lf.cag_schedule(**plan), _weights(plan)
    kept = (weights * (1 - s))[weights > 0]
    if len(kept) and plan["sparsity"] > 0:
        # A chunk smaller than the number keeps all it has; no other differs.
        free = s[weights > 0] > 0
        np.testing.assert_allclose(kept[free], kept.max(), rtol=1e-9)
        np.testing.assert_array_equal(kept[~free], weights[weights > 0][~free])


@generated(100, plan=plans(), beyond=st.integers(0, 50))
def test_a_call_finds_its_chunk_by_its_frames(plan, beyond):
    s, schedule, ends = lf.cag_schedule(**plan), lf.Schedule.solve(**plan), _ends(plan)
    np.testing.assert_array_equal(schedule.sparsity, s)
    before = np.append(0, ends[:-1])
    for c, first_frame in enumerate(before):
        n = int(first_frame) + plan["frames_per_chunk"]
        is_short_last = c == len(ends) - 1 and n > ends[c]
        if n == ends[c] or is_short_last:  # other chunks are odd: their calls find another
            assert schedule.at(n) == s[c]
    weights = _weights(plan)
    later = int(ends[-1]) + plan["frames_per_chunk"] * (1 + beyond)
    dense = plan["frames_per_chunk"] if plan["dense_frames"] is None else plan["dense_frames"]
    if later - plan["frames_per_chunk"] < dense:
        assert schedule.at(later) == 0
    elif not weights.any():
        assert schedule.at(later) == plan["sparsity"]
    elif plan["law"] == "count" and plan["sparsity"] > 0:
        last = np.flatnonzero(weights)[-1]
        resident = min(later, plan["window"] or later)
        if s[last] > 0:
            kept = (1 - s[last]) * weights[last]
            assert schedule.at(later) == pytest.approx(max(0, 1 - kept / resident), abs=1e-9)
    else:
        assert schedule.at(later) == s[-1]


def test_given_schedule_is_taken_as_it_is():
    values = [0, 0.5, 0.25, 0.75]
    schedule = lf.Schedule.given(values, frames_per_chunk=3)
    np.testing.assert_array_equal(schedule.sparsity, values)
    assert [schedule.at(n) for n in (3, 6, 9, 12, 15, 300)] == [0, 0.5, 0.25, 0.75, 0.75, 0.75]


def test_a_solved_schedule_cannot_be_changed():
    schedule = lf.Schedule.solve(21, 3, sparsity=0.8)
    with pytest.raises(ValueError, match="read-only"):
        schedule.sparsity[1] = 0.5
    lf.cag_schedule(21, 3)[1] = 0.5  # a copy of one's own
    with pytest.raises(AttributeError, match="window: .*Schedule"):
        schedule.window = 12
    with pytest.raises(AttributeError, match="law: .*Schedule"):
        del schedule.law
    for again in copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule)):
        assert [again.at(n) for n in range(3, 40)] == [schedule.at(n) for n in range(3, 40)]
        assert repr(again) == repr(schedule) and again != schedule
    assert repr(schedule).startswith("Schedule(sparsity=array([0.") and schedule == schedule


def test_single_chunk_plan_uses_the_target_later():
    schedule = lf.Schedule.solve(3, 3, sparsity=0.8)
    assert schedule.at(3) == 0 and schedule.at(6) == 0.8 and schedule.at(600) == 0.8


def test_rolling_window_holds_the_last_value():
    schedule = lf.Schedule.solve(None, 3, sparsity=0.85, base=0.95, window=12)
    assert schedule.at(66) == schedule.at(6300) == schedule.sparsity[-1]
