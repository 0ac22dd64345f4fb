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


def test_tuning_moves_a_copy_and_the_report_has_every_rule():
    model = tiny_model()
    before = {n: w.clone() for n, w in model.state_dict().items()}
    arms = [MASS, HSA, _rules.Row("dense")]
    args = SimpleNamespace(seconds=1e9, steps=3, step_clips=1, batch=2, seed=0, clock=False)
    said = []
    found = tuning.run(model, SMALL, arms, world.clips(2, view=32), args, said.append)
    assert all(torch.equal(w, before[n]) for n, w in model.state_dict().items())
    assert [found[r.name]["steps"] for r in arms] == [3, 3, 3]
    assert said[1].startswith("mass count: 3 steps in ")
    for name, arm in found.items():
        assert arm["before"]["all"] != arm["after"][name]["all"]
        assert list(arm["after"]) == list(found)
    lines = tuning.text(found)
    assert sum(line.startswith("mass count  ") for line in lines) == 1 + 3
    both = next(x for x in lines if x.startswith("tuned under hsa cag: mass count - hsa cag"))
    difference = sum(found["hsa cag"]["after"]["mass count"]["all"])
    difference -= sum(found["hsa cag"]["after"]["hsa cag"]["all"])
    assert f"{difference / 2:+.2f}" in both


def test_later_rules_take_the_first_ones_steps_unless_by_the_clock(monkeypatch):
    asked = []

    def tune(model, table, row, *, seconds, steps, **_):
        asked.append((row.name, seconds, steps))
        return model, 7

    monkeypatch.setattr(tuning, "tune", tune)
    monkeypatch.setattr(tuning.Exam, "run", lambda *_: {"scores": {}})
    args = SimpleNamespace(seconds=60, steps=100, step_clips=1, batch=2, seed=0, clock=False)
    arms, exam = [MASS, HSA], world.clips(1, view=32)
    tuning.run(tiny_model(), SMALL, arms, exam, args, print)
    assert asked == [("mass count", 60, 100), ("hsa cag", float("inf"), 7)]
    asked.clear()
    args.clock = True
    tuning.run(tiny_model(), SMALL, arms, exam, args, print)
    assert asked == [("mass count", 60, 100), ("hsa cag", 60, 100)]


def test_a_finished_rule_is_not_tuned_again(tmp_path, monkeypatch):
    model, exam, arms = tiny_model(), world.clips(1, view=32), [MASS, _rules.Row("dense")]
    args = SimpleNamespace(seconds=1e9, steps=2, step_clips=1, batch=2, seed=0, clock=False)
    store = _paired.Store(tmp_path / "t.jsonl", {"commit": "a"})
    tuned, original, broken = [], tuning.tune, True

    def tune(model, table, row, **more):
        if broken and row.selector is None:
            raise RuntimeError("out of time")
        tuned.append(row.name)
        return original(model, table, row, **more)

    monkeypatch.setattr(tuning, "tune", tune)
    with pytest.raises(RuntimeError, match="out of time"):
        tuning.run(model, SMALL, arms, exam, args, print, store)
    broken = False
    again = _paired.Store(tmp_path / "t.jsonl", {"commit": "a"})
    found = tuning.run(model, SMALL, arms, exam, args, print, again)
    assert tuned == ["mass count", "dense"]
    assert found["mass count"]["steps"] == found["dense"]["steps"] == 2
    assert tuning.text(found)


def test_the_loss_falls_under_the_rule():
    losses = []
    report = lambda line: losses.append(float(line.split()[-1]))  # noqa: E731
    tuning.tune(tiny_model(), SMALL, MASS, seconds=1e9, steps=21, batch=1, report=report)
    assert len(losses) == 2 and losses[-1] < losses[0]
