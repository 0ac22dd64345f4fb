"""Tuning under a rule: the mask is what the kernels attend to, and tuning helps under it."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_demo import model as tiny_model

import lightforcing as lf
from lightforcing import world
from lightforcing.world.layout import Layout

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import _paired  # noqa: E402
import _rules  # noqa: E402
import tuning  # noqa: E402

SMALL = _rules.Table(32, 16, 16, 2)
MASS = _rules.Row("mass count", selector="mass", kept=SMALL.counts("count"))
MASS_CAG = _rules.Row("mass cag", selector="mass", kept=SMALL.counts("cag"))
HSA = _rules.Row("hsa cag", selector="hsa", kept=SMALL.counts("cag"))


def sequence(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(2, 12 * 3 * 64, 1, 32, generator=draw) for _ in range(3))


@pytest.mark.parametrize("name", ["mass count", "hsa cag", "random cag"])
def test_a_chunk_of_a_sequence_attends_as_the_patched_call(name):
    """Chunk 3 of the noisy half: clean chunks 0 to 2, then itself."""
    selector, law = name.split()
    row = _rules.Row(name, selector=selector, kept=SMALL.counts(law))
    layout = Layout(7, 1)
    q, k, v = sequence()
    out = tuning.masked(layout, SMALL, row)(q, k, v)
    (place,) = [i for i in range(12) if layout.noisy[i] and layout.chunk[i] == 3]
    seen = [i for i in range(6) if layout.chunk[i] < 3] + [place]
    tokens = [slice(192 * i, 192 * i + 192) for i in seen]
    q, (k, v) = q[:, tokens[-1]], (torch.cat([x[:, t] for t in tokens], 1) for x in (k, v))
    blocks = lf.selectors.select(
        selector, q, k, frame_tokens=64, kept=row.kept[2], block_q=16, block_k=16, grid=(8, 8),
        order="morton", chunk=4,
    )  # fmt: skip
    expected = lf.block_sparse_attention(q, k, v, blocks)
    assert torch.allclose(out[:, tokens[-1]], expected, atol=1e-5)


def test_the_first_chunk_and_dense_rows_see_everything():
    layout = Layout(7, 1)
    q, k, v = sequence()
    dense = layout.split(64)(q, k, v)
    assert torch.equal(tuning.masked(layout, SMALL, _rules.Row("dense"))(q, k, v), dense)
    sparse = tuning.masked(layout, SMALL, MASS)(q, k, v)
    assert torch.allclose(sparse[:, :192], dense[:, :192], atol=1e-6)
    assert not torch.allclose(sparse[:, 192:], dense[:, 192:], atol=1e-2)


def test_gradients_pass_through_what_is_kept():
    q, k, v = (x.requires_grad_() for x in sequence(1))
    tuning.masked(Layout(7, 1), SMALL, MASS)(q, k, v).square().sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in (q, k, v))


def arguments(**changes):
    made = dict(seconds=1e9, limit=1e9, steps=2, step_clips=1, batch=2, seed=0, clock=False)
    return SimpleNamespace(**(made | changes))


def test_tuning_moves_a_copy_and_the_report_has_every_rule():
    model = tiny_model()
    before = {n: w.clone() for n, w in model.state_dict().items()}
    arms, also = [MASS, HSA, _rules.Row("dense")], [MASS_CAG]
    said, at = [], []
    found, missing = tuning.run(
        model, SMALL, arms, world.clips(2, view=32), arguments(steps=3), said.append, also=also,
        done=lambda found, missing: at.append(list(found)),
    )  # fmt: skip
    assert not missing and at[0] == ["untuned"] and at[-1] == list(found)
    assert all(torch.equal(w, before[n]) for n, w in model.state_dict().items())
    assert [found[r.name]["steps"] for r in arms] == [3, 3, 3]
    assert said[1].startswith("mass count: 3 steps in ")
    for name, arm in found.items():
        assert list(arm["scores"]) == ["mass count", "hsa cag", "dense", "mass cag"]
        if name != "untuned":
            assert arm["scores"][name]["all"] != found["untuned"]["scores"][name]["all"]
    lines = tuning.text(found)
    assert sum(line.startswith("mass count  ") for line in lines) == 1 + 4
    both = next(x for x in lines if x.startswith("tuned under hsa cag: mass count - hsa cag"))
    scores = found["hsa cag"]["scores"]
    difference = sum(scores["mass count"]["all"]) - sum(scores["hsa cag"]["all"])
    assert f"{difference / 2:+.2f}" in both
    assert any(x.startswith("untuned: hsa cag - mass cag ") for x in lines)


def test_the_gap_that_tuning_closed_is_counted_against_dense_tuned_as_long():
    def scores(mass, dense):
        every = dict.fromkeys(("bare", "back", "all"))
        more = dict(glyph_easy=[1.0, 1.0], glyph_hard=[0.0, 1.0])
        return {
            "mass count": {name: mass for name in every} | more,
            "dense": {name: dense for name in every} | more,
        }

    found = {
        "untuned": dict(steps=0, scores=scores([20.0, 21.0], [22.0, 24.0])),
        "mass count": dict(steps=2, scores=scores([23.0, 25.0], [0.0, 0.0])),
        "dense": dict(steps=2, scores=scores([0.0, 0.0], [24.0, 26.0])),
    }
    line = next(x for x in tuning.text(found) if x.startswith("mass count  "))
    means = [float(part.split()[-1]) for part in line.split("[")[:-1]]
    assert means == [3.5, -2.5, -1.0, 1.5]  # gained, gap before and after, closed


def test_later_rules_take_the_first_ones_steps_unless_by_the_clock(monkeypatch):
    asked = []

    def tune(model, table, row, *, seconds, steps, **_):
        asked.append((row.name, seconds, steps))
        return model, 7

    monkeypatch.setattr(tuning, "tune", tune)
    monkeypatch.setattr(tuning.Exam, "run", lambda *_: {"scores": {}})
    args = arguments(seconds=60, steps=100)
    arms, exam = [MASS, HSA], world.clips(1, view=32)
    tuning.run(tiny_model(), SMALL, arms, exam, args, print)
    assert asked == [("mass count", 60, 100), ("hsa cag", float("inf"), 7)]
    asked.clear()
    args.clock = True
    tuning.run(tiny_model(), SMALL, arms, exam, args, print)
    assert asked == [("mass count", 60, 100), ("hsa cag", 60, 100)]


def test_a_rule_that_fails_or_has_no_time_loses_no_other(tmp_path, monkeypatch):
    model, exam, arms = tiny_model(), world.clips(1, view=32), [MASS, _rules.Row("dense")]
    store = _paired.Store(tmp_path / "t.jsonl", {"commit": "a"})
    tuned, original, broken = [], tuning.tune, True

    def tune(model, table, row, **more):
        if broken and row.selector is None:
            raise RuntimeError("out of memory")
        tuned.append(row.name)
        return original(model, table, row, **more)

    monkeypatch.setattr(tuning, "tune", tune)
    found, missing = tuning.run(model, SMALL, arms, exam, arguments(), print, store)
    assert list(found) == ["untuned", "mass count"]
    assert missing == {"dense": "RuntimeError: out of memory"} and tuning.text(found)
    broken = False
    again = _paired.Store(tmp_path / "t.jsonl", {"commit": "a"})
    found, missing = tuning.run(model, SMALL, arms, exam, arguments(), print, again)
    assert tuned == ["mass count", "dense"] and not missing
    assert found["mass count"]["steps"] == found["dense"]["steps"] == 2
    late = arguments(limit=0.0)
    assert tuning.run(model, SMALL, arms, exam, late, print)[1] == {
        "untuned": "no time left", "mass count": "no time left", "dense": "no time left",
    }  # fmt: skip


def test_parts_are_halved_where_the_memory_does_not_suffice(monkeypatch):
    asked, original = [], tuning._gradients

    def gradients(model, layout, attend, sequence, part):
        asked.append(part)
        if part > 1:
            raise torch.OutOfMemoryError("full")
        return original(model, layout, attend, sequence, part)

    monkeypatch.setattr(tuning, "_gradients", gradients)
    tuning.tune(tiny_model(), SMALL, _rules.Row("dense"), seconds=1e9, steps=2, batch=4)
    assert asked == [4, 2, 1, 1]


def test_the_parts_of_a_step_sum_to_the_whole():
    tuned = [
        tuning.tune(tiny_model(), SMALL, MASS, seconds=1e9, steps=1, batch=3, part=part)[0]
        for part in (3, 2)
    ]
    for a, b in zip(*(m.state_dict().values() for m in tuned), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_the_loss_falls_under_the_rule():
    losses = []
    report = lambda line: losses.append(float(line.split()[-1]))  # noqa: E731
    tuning.tune(tiny_model(), SMALL, MASS, seconds=1e9, steps=21, batch=1, report=report)
    assert len(losses) == 2 and losses[-1] < losses[0]
