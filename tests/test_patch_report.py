"""patch: what the user reads. Statistics, report, explain, timing and recall."""

import json
import re
import threading

import fake_ar as ar
import pytest
import torch

import lightforcing as lf
from lightforcing import _core, report, sparse, stats
from lightforcing.decide import Decision
from lightforcing.step import Step

SMALL = {"block_q": 16, "block_k": 16}


@pytest.fixture
def model():
    return ar.make()


def test_report_of_a_run(model):
    with lf.patched(model, "paper", dense_layers=[0], **SMALL) as handle:
        ar.rollout(model, 3)
        text = handle.report()
    assert str(handle) == handle.report()
    assert text.splitlines() == [
        "lightforcing: 2 layers of InPlace; sparsity 0.88 (base 0.98) by law linear, mean scores, "
        "frames 6/1/2 first",
        "dense by wish: layers [0], steps []",
        "20 tokens a frame, 3 frames a chunk, planned for 21 frames (7 chunks, this run had 3)",
        "chunk  calls  sparse  sparsity  density",
        "    1      6       0         -   100.0%",
        "    2      6       3     0.827    58.3%",
        "    3      6       3     0.855    55.6%",
        "dense, through the original function:",
        "       9  dense layer",
        "       3  first chunk",
        "attention: 1.57x fewer query-key pairs than dense (6 of 18 calls sparse)",
    ]
    assert handle.report().startswith("lightforcing: unpatched (InPlace); sparsity 0.88")


def test_report_says_which_geometry_it_counted_with(model):
    def line(chunks, **settings):
        with lf.patched(model, **settings, **SMALL) as handle:
            ar.rollout(model, chunks)
            return handle.report().splitlines()[1]

    assert line(3, num_frames=9).endswith("3 frames a chunk, planned for 9 frames (3 chunks)")
    assert line(3, frames_per_chunk=1, num_frames=9).split(", ")[1:] == [
        "1 frame a chunk", "planned for 9 frames (9 chunks", "this run had 7)",
    ]  # fmt: skip
    assert ", a window of 6 frames, planned for 63 frames (21 chunks, " in line(2, window=6)


@pytest.mark.parametrize(
    "settings, why",
    [
        ({}, ": all lie in the first chunk, 3 frames"),
        (
            {"frames_per_chunk": 7},
            ": all lie in the first chunk, 7 frames as frames_per_chunk says, though a query has "
            "only 3",
        ),
        ({"dense_layers": [0, 1]}, " (dense layer)"),
        ({"dense_frames": 9}, " (dense_frames and first chunk)"),
    ],
)
def test_report_of_a_run_without_a_sparse_call_says_why(model, settings, why):
    chunks = 2 if settings else 1
    with lf.patched(model, **settings, **SMALL) as handle:
        ar.rollout(model, chunks)
        last = handle.report().splitlines()[-1]
    assert last == f"none of the {6 * chunks} calls was sparse{why}"


def test_report_says_when_no_call_had_a_dense_step(model):
    def line(**settings):
        with lf.patched(model, **settings, **SMALL) as handle:
            ar.rollout(model, 2)
            return handle.report().splitlines()[1]

    assert line(dense_steps=[99]) == "dense by wish: layers [], steps [99] that no call had"
    assert line(dense_steps=[2, 99]) == "dense by wish: layers [], steps [2, 99]"
    both = {"dense_layers": [0, 1], "dense_steps": [1]}  # whatever the step, the layer is dense
    assert line(**both) == "dense by wish: layers [0, 1], steps [1]"


def test_report_before_any_call(model):
    with lf.patched(model, **SMALL) as handle:
        assert handle.report().splitlines()[1:] == ["no calls yet"]
        assert handle.stats() == {
            "calls": 0, "sparse_calls": 0, "sparsity": None, "density": None, "dense": {},
            "recall": None, "recall_p5": None, "ms": None, "attention_share": None,
            "means_bytes": 0, "chunks": [], "layers": [],
        }  # fmt: skip
        assert repr(handle) == "<lightforcing.Handle of 2 layers, sparsity 0.8>"


def test_html_escapes_and_tells_the_same(model):
    with lf.patched(model, "fast", **SMALL) as handle:
        ar.rollout(model, 3)
        handle.facts["layer"] = "<Odd>"
        html = handle._repr_html_()
    assert "<Odd>" not in html and "&lt;Odd&gt;" in html
    cells = re.findall(r"<t[hd]>([^<]*)</t[hd]>", html)
    assert cells[:10] == [
        "chunk", "calls", "sparse", "sparsity", "density", "1", "6", "0", "-", "100.0%",
    ]  # fmt: skip
    assert "first chunk" in html


def test_stats_are_json_and_sum_up(model):
    with lf.patched(model, "fast", **SMALL) as handle:
        ar.rollout(model, 4)
        values = handle.stats()
        whole = handle.to_dict()
    assert json.loads(json.dumps(whole)) == whole
    assert whole["config"] == handle.config.to_dict() and whole["layers"] == 2
    for name in ("calls", "sparse_calls"):
        by_layer = [c[name] for x in values["layers"] for c in x["chunks"]]
        assert sum(by_layer) == sum(c[name] for c in values["chunks"]) == values[name]
    # pairs: 3 x (3 + 6 + 9 + 12) frames, of which (3 + 1.5 + 1.5 + 1.5) are computed
    assert values["density"] == pytest.approx(7.5 / 30)
    assert [c["density"] for c in values["layers"][1]["chunks"]] == pytest.approx(
        [1, 3 / 12, 3 / 18, 3 / 24]
    )


def test_keep_frames_that_rose_are_reported(model):
    settings = {"keep_frames": 2, "sink_frames": 1, "near_frames": 1, "hierarchy": True}
    with lf.patched(model, sparsity=0.3, law="constant", **settings, **SMALL) as handle:
        ar.rollout(model, 4)
    # 12 frames are 24 blocks, 16 kept; 3 own and 2 past frames hold 10, so 5 past ones are needed
    notes = [line for line in handle.report().splitlines() if "rose" in line]
    assert notes == [
        "keep_frames rose to 3 in chunk 3: the budget holds more blocks",
        "keep_frames rose to 5 in chunk 4: the budget holds more blocks",
    ]
    assert [c.get("keep_frames") for c in handle.stats()["chunks"]] == [None, None, 3, 5]


def test_long_streams_stay_short(model, monkeypatch):
    monkeypatch.setattr(stats, "LAST_CHUNK", 60)
    model = ar.make(ar.Rolling, layers=1)
    cache = ar.new_cache(model, frames=240)
    with lf.patched(model, "fast", window=9, **SMALL) as handle:
        ar.rollout(model, 70, steps=0, cache=cache)
    assert len(handle.record.cells) == 60 and handle.stats()["calls"] == 70
    lines = handle.report().splitlines()
    assert len(lines) < 50 and any(set(line.split()) == {"..."} for line in lines)


# ---- explain -----------------------------------------------------------------------------


def test_explain_says_what_is_assumed_until_a_call_tells(model):
    with lf.patched(model, "paper") as handle:
        plan = handle.explain()
        assert plan.assumed == ("3 frames a chunk", "1560 tokens a frame", "no window")
        assert [r["kept"] for r in plan.rows] == [75, 25, 32, 38, 43, 48, 53]
        assert [r["blocks"] for r in plan.rows] == [75, 150, 225, 300, 375, 450, 525]
        text = str(plan).splitlines()
        assert text[2].split() == ["1", "0-2", "3", "dense", "75", "of", "75", "1.0x"]
        assert text[8].split() == ["7", "18-20", "21", "0.898", "53", "of", "525", "9.9x"]
        assert text[-1] == (
            "assumed, until a call tells: 3 frames a chunk, 1560 tokens a frame, no window"
        )
        ar.rollout(model, 2, frames=4)
        told = handle.explain()
        assert told.assumed == () and (told.frame_tokens, told.frames_per_chunk) == (20, 4)
        given = handle.explain(num_frames=9, frames_per_chunk=3, frame_tokens=1560)
        assert [r["kept"] for r in given.rows][0] == 75 and len(given.rows) == 3


def test_plan_needs_no_model_and_gains_are_amdahls():
    plan = report.plan(lf.Config.preset("paper"), attention_share=0.5)
    resident, kept = (75 + 150 + 225 + 300 + 375 + 450 + 525), (75 + 25 + 32 + 38 + 43 + 48 + 53)
    assert plan.attention_gain == pytest.approx(resident / kept)
    assert plan.step_gain == pytest.approx(1 / (0.5 + 0.5 * kept / resident))
    assert "whole step: 1.74x at most, with attention at 50% of a dense step" in str(plan)
    assert report.plan(lf.Config()).step_gain is None
    assert json.loads(json.dumps(plan.to_dict())) == plan.to_dict()
    with pytest.raises(ValueError, match=r"attention_share: expected a number in \[0, 1\], got 2"):
        report.plan(lf.Config(), attention_share=2)


def test_plan_of_short_last_and_lone_first_chunks():
    short = report.plan(lf.Config.preset("paper"), num_frames=8)
    assert [(r["first_frame"], r["last_frame"]) for r in short.rows] == [(0, 2), (3, 5), (6, 7)]
    lone = report.plan(lf.Config(chunk_ends=(1, 4, 7), law="constant"))
    assert [(r["resident_frames"], r["sparsity"]) for r in lone.rows] == [(1, 0), (4, 0), (7, 0.8)]
    windowed = report.plan(lf.Config.preset("paper-long"))
    assert [r["kept"] for r in windowed.rows][:7] == [75, 39, 50, 60, 55, 52, 49]
    assert windowed.rows[-1]["resident_frames"] == 12 and len(windowed.rows) == 21


def test_statistics_read_meanwhile_are_of_one_moment(monkeypatch):
    """Another thread records while a snapshot is taken: it lands before or after, not between."""
    record, call, writers = stats.Record(), Decision(20, 3, 3, 3, 3, None, 10), []

    def write():
        for layer in (0, 1):
            record.sparse(layer, call, 0.5, None, None)

    write()
    add = stats.Cell.add

    def slow(cell, other):
        add(cell, other)
        writers.append(threading.Thread(target=write))
        writers[-1].start()
        writers[-1].join(timeout=0.2)

    monkeypatch.setattr(stats.Cell, "add", slow)
    assert [cell.calls for cell in record.snapshot().values()] == [1, 1]
    monkeypatch.undo()
    for writer in writers:
        writer.join()
    assert [cell.calls for cell in record.snapshot().values()] == [3, 3]


# ---- timing and recall -------------------------------------------------------------------


def test_timing_by_layer_and_chunk(model, monkeypatch):
    """A clock that moves by 1 s a reading: each call takes one."""
    from itertools import count

    ticks = count()
    clock = type("Clock", (), {"perf_counter": staticmethod(lambda: float(next(ticks)))})
    monkeypatch.setattr(stats, "time", clock)
    with lf.patched(model, "fast", timing=True, **SMALL) as handle:
        ar.rollout(model, 3)
        values = handle.stats()
    assert values["ms"] == 18_000 and values["dense_ms"] == 6_000
    assert [c["ms"] for c in values["layers"][0]["chunks"]] == [3_000, 3_000, 3_000]
    # A step is 5 readings from one entry of layer 0 to the next, 2 of them attention.
    assert handle.record.steps == 6  # the last of a chunk ends with whatever comes before the next
    assert values["attention_share"] == pytest.approx(2 / 5)
    assert "attention took 40% of a step, as it ran" in handle.report()
    assert "ms a call" in handle.report() and "1000.000" in handle.report()
    # Dense steps: 2 in 5. Sparse: 2 / density in 3 + 2 / density, at 3 of 12 and 3 of 18.
    dense, wall = 2 * 2 + 2 * 8 + 2 * 12, 2 * 5 + 2 * 11 + 2 * 15
    assert handle.record.dense_attention_share == pytest.approx(dense / wall)
    plan = handle.explain()
    assert plan.attention_share == pytest.approx(dense / wall)
    assert plan.step_gain > 1 and "whole step" in str(plan)


def test_steps_are_of_one_chunk(model):
    """What lies between two chunks, or two videos, may be a decoder's time."""
    with lf.patched(model, "fast", timing=True, **SMALL) as handle:
        ar.rollout(model, 2)
        assert handle.record.steps == 4
        ar.rollout(model, 2)
        assert handle.record.steps == 8
        caches = ar.new_cache(model), ar.new_cache(model)
        for cache in caches:  # two videos of one forward
            ar.rollout(model, 1, steps=0, cache=cache)
        assert handle.record.steps == 8


def test_timing_is_off_by_default(model):
    with lf.patched(model, "fast", **SMALL) as handle:
        ar.rollout(model, 2)
        assert handle.stats()["ms"] is None and handle.stats()["attention_share"] is None


@pytest.mark.parametrize("preset", ["paper", "fast"])
def test_probe_is_the_share_of_dense_attention_mass(preset, monkeypatch):
    """Against the softmax mass in float64 of the same rows."""
    truth, run = [], Step.run

    def running(step, q, k, v, *rest, **keywords):
        result = run(step, q, k, v, *rest, **keywords)
        blocks = step.blocks(result[2])
        logits = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * q.shape[3] ** -0.5
        token = torch.arange(k.shape[1])
        kept = blocks.to_bool()[:, :, torch.arange(q.shape[1]) // 16]
        kept = kept[..., token // 20 * 2 + token % 20 // 16]
        truth.append((logits.softmax(-1) * kept).sum(-1).flatten())
        return result

    monkeypatch.setattr(Step, "run", running)
    model = ar.make(layers=1)
    with lf.patched(model, preset, probe=10_000, **SMALL) as handle:  # every row
        ar.rollout(model, 2, steps=0)
    chunk = handle.stats()["chunks"][1]
    assert len(truth) == 1
    assert chunk["recall"] == pytest.approx(truth[0].mean().item(), abs=1e-5)
    assert chunk["recall_p5"] == pytest.approx(truth[0].quantile(0.05).item(), abs=1e-5)
    assert handle.stats()["chunks"][0]["recall"] is None


def test_probe_of_a_few_rows_changes_no_result(model):
    with lf.patched(model, "fast", **SMALL) as handle:
        plain = ar.rollout(model)
        assert handle.stats()["recall"] is None
        lf.patch(model, "fast", probe=7, **SMALL)
        assert torch.equal(ar.rollout(model), plain)
        values = handle.stats()
    assert 0 < values["recall_p5"] < values["recall"] < 1
    assert re.search(r"recall +p5\n", handle.report())


def test_probe_of_a_whole_selection_is_one(model):
    """Nearly all blocks kept: the recall comes to nearly 1."""
    with lf.patched(model, sparsity=0.09, law="constant", probe=16, **SMALL) as handle:
        ar.rollout(model, 3)
    assert handle.stats()["sparse_calls"] > 0 and handle.stats()["recall"] > 0.9


@pytest.mark.parametrize("dense_layers", [(), (0,)])
def test_a_captured_call_is_counted_and_not_measured(model, monkeypatch, dense_layers):
    """In a CUDA graph an event holds no time and a probe would run with every replay."""
    facts, graph = _core.facts, [0]  # a stand-in for the stream
    monkeypatch.setattr(_core, "facts", lambda *a: (*facts(*a)[:2], graph[0]))
    cache, made = ar.new_cache(model), []
    monkeypatch.setattr(sparse, "Timer", lambda q: made.append(q) or stats.Timer(q))
    with lf.patched(
        model, "fast", timing=True, probe=8, dense_layers=dense_layers, **SMALL
    ) as handle:
        ar.rollout(model, 2, cache=cache)
        before, timed = handle.stats(), len(made)
        graph[0] = 7
        model(ar.noise(3), kv_cache=cache, current_start=6 * ar.T)
        after = handle.stats()
        assert after["calls"] == before["calls"] + 2 and len(made) == timed == 12
        assert after["chunks"][2]["recall"] is None and after["chunks"][2]["ms"] == 0
        graph[0] = 0
        model(ar.noise(3), kv_cache=cache, current_start=6 * ar.T)
        assert handle.stats()["chunks"][2]["recall"] > 0 and len(made) == timed + 2


def test_what_the_device_keeps_is_summed_apart():
    """A captured call adds numbers only: a sum on the device would go into its graph."""
    record, call = stats.Record(), Decision(20, 3, 3, 3, 3, None, 100)
    record.sparse(0, call, torch.tensor([0.25]), None, None)
    record.sparse(0, call, 0.5, None, None)
    record.dense(0, call.chunk, "a reason", 100)
    (cell,) = record.cells.values()
    assert cell.kept_pairs == 150 and type(cell.kept_pairs) is float
    assert cell.to_dict()["density"] == stats.total([cell]).to_dict()["density"] == 175 / 300
