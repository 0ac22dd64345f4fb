"""The quality table: budgets by hand, and whole small tables with a tiny world model."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_demo import model as tiny_model

import lightforcing as lf
from lightforcing import capturing, selectors, world

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import _compiled  # noqa: E402
import _judge  # noqa: E402
import _paired  # noqa: E402
import _quality_report  # noqa: E402
import _rules  # noqa: E402
import quality  # noqa: E402

SMALL = _rules.Table(32, 16, 16, 2)  # 64 tokens a frame: four blocks


# ---- budgets -----------------------------------------------------------------------------


def test_every_law_keeps_the_same_total():
    """At 16 blocks a frame and 0.88/0.98, as the paper's schedule rounds."""
    for table in _rules.TABLES.values():
        assert table.blocks == (96, 144, 192, 240, 288, 336)
        assert table.counts("cag") == (16, 20, 24, 28, 31, 34)
        assert table.counts("uniform") == (11, 17, 23, 28, 34, 40)
        assert table.counts("count") == (26, 26, 26, 25, 25, 25)
        assert {sum(table.counts(law)) for law in _rules.LAWS} == {153}
    with pytest.raises(ValueError, match="law: expected one of cag, uniform, count, reversed"):
        SMALL.counts("linear")


def test_reversed_gives_early_chunks_the_late_shares():
    kept, cag = (_rules.TABLES[64].counts(law) for law in ("reversed", "cag"))
    share = np.divide(kept, _rules.TABLES[64].blocks)
    assert (np.diff(share) > 0).all() and (np.diff(np.divide(cag, (96, 144, 192, 240, 288, 336)))
                                           < 0).all()  # fmt: skip


def test_shared_out_gives_the_largest_remainders():
    assert _rules.shared_out([2.5, 1.2, 3.3], 7) == (3, 1, 3)
    assert _rules.shared_out([0.2, 1.9], 3) == (1, 2)
    with pytest.raises(ValueError, match="total: expected 6 to 9, got 10"):
        _rules.shared_out([2.5, 1.2, 3.3], 10)


@pytest.mark.parametrize("table", _rules.TABLES.values(), ids=str)
def test_rows_are_unique_and_their_settings_hold(table):
    made = _rules.rows(table, selectors.names())
    names = [r.name for r in made]
    assert len(set(names)) == len(names) and names[0] == "dense"
    assert names[:7] == [r.name for r in _rules.key_rows(table)]
    assert set(selectors.names()) <= {r.selector for r in made} | {"dense"}
    for row in made[1:]:
        config = row.config(table, selectors.Budget(((1.0,),)))
        if row.preset is not None:
            continue
        kept = [
            lf.plan_selection(3, 3 * (i + 2), table.frame_tokens, sparsity=s, hierarchy=False,
                              block_k=table.block_k)[1] if s else 0
            for i, s in enumerate(config.schedule[1:])
        ]  # fmt: skip
        assert tuple(kept) == row.kept
        if row.group not in ("pareto", "chunks"):
            assert sum(row.kept) == 153
    frames = next(r for r in made if r.name == "mass cag frames").config(table)
    assert (frames.score, frames.hierarchy) == ("mass", True)
    paper = next(r for r in made if r.name == "hsa cag").config(table)
    assert (paper.score, paper.hierarchy, paper.keep_frames) == ("mean", True, 6)


@pytest.mark.parametrize("table", _rules.TABLES.values(), ids=str)
def test_presets_are_rows_as_they_are_shipped(table):
    every = [r for r in _rules.rows(table, selectors.names()) if r.preset]
    made = {r.preset: r for r in every if not r.settings}
    assert list(made) == ["paper", "fast", "balanced", "quality"]
    for name, row in made.items():
        config, shipped = row.config(table), lf.Config.preset(name)
        alike = {"block_q", "block_k", "num_frames", "frames_per_chunk"}
        changed = {k for k, v in config.to_dict().items() if v != shipped.to_dict()[k]}
        assert changed <= (alike if table.view == 64 else alike - {"block_q", "block_k"})
        assert len(row.kept) == 6 and row.selector == ("hsa" if name == "paper" else "mass")
    assert made["paper"].kept == table.counts("cag")
    assert sum(made["fast"].kept) < sum(made["balanced"].kept) < sum(made["quality"].kept)
    changed = {r.name: r for r in every if r.settings}
    even = {f"preset {name} even" for name in ("fast", "balanced", "quality")}
    assert even == set(changed) if table.view == 64 else even < set(changed)
    for name, row in changed.items():
        before, after = (r.config(table).to_dict() for r in (made[row.preset], row))
        assert {k: v for k, v in after.items() if v != before[k]} == row.settings, name
        # Another block size keeps the same blocks; another law shares about as many out otherwise.
        if "law" in row.settings:
            assert row.kept[0] < made[row.preset].kept[0] and row.kept[-1] > row.kept[0]
        else:
            assert row.kept == made[row.preset].kept


def test_one_sparse_chunk_at_a_time():
    made = _rules.starved(_rules.TABLES[64])
    assert made["only 2 share"] == (9, 0, 0, 0, 0, 0)
    assert made["only 7 share"] == (0, 0, 0, 0, 0, 33)
    assert made["only 4 number"] == (0, 0, 21, 0, 0, 0)


# ---- rows --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exam():
    clips = world.clips(3, view=32)
    made = quality.Exam(tiny_model(), clips, SMALL, 2)
    made.run(_rules.Row("dense"))
    return made


def test_a_full_list_is_the_dense_row(exam):
    dense = exam.run(_rules.Row("dense"))
    full = exam.run(_rules.Row("full", selector="dense", kept=(5, 5, 5, 5, 5, 5)))
    for name, values in dense["scores"].items():
        assert values == pytest.approx(full["scores"][name], abs=2e-3, nan_ok=True), name
    assert dense["kept"] == list(SMALL.blocks) and dense["clips"] == 3
    assert max(full["scores"]["from_dense_6"]) < 1e-6


def test_a_row_counts_what_was_kept_and_differs(exam):
    row = _rules.Row("mass count", selector="mass", kept=SMALL.counts("count"))
    made = exam.run(row)
    assert made["kept"] == list(SMALL.counts("count")) == made["planned"]
    assert len(made["scores"]["all"]) == 3 and made["scores"]["from_dense_1"][0] > 1e-6
    batch = quality.Exam(exam.model, exam.clips, SMALL, 3)
    again = batch.run(row)  # other batches, the same noise
    assert again["scores"]["all"] == pytest.approx(made["scores"]["all"], abs=2e-3)


def test_a_preset_keeps_the_blocks_that_its_row_says(exam):
    made = exam.run(_rules.preset_row("quality", SMALL))
    assert made["kept"] == made["planned"] and made["settings"]["law"] == lf.Config.preset(
        "quality").law  # fmt: skip


def test_a_compiled_model_keeps_its_attention_for_the_patch(exam):
    """Only the arithmetic around it is another function; ``eager`` runs it as traced."""
    fast = _compiled.compiled(exam.model, backend="eager")
    quick = quality.Exam(exam.model, exam.clips[:2], SMALL, 2, fast=fast)
    plain = quality.Exam(exam.model, exam.clips[:2], SMALL, 2)
    row = _rules.Row("mass count", selector="mass", kept=SMALL.counts("count"))
    for each in (_rules.Row("dense"), row):
        one, two = quick.run(each), plain.run(each)
        assert one["kept"] == two["kept"] == list(each.kept or SMALL.blocks)
        for name, values in two["scores"].items():
            assert values == pytest.approx(one["scores"][name], abs=2e-3, nan_ok=True), name
    assert not any(vars(b.self_attn).get("forward") for b in fast.blocks)  # unpatched again
    odd = quality.Exam(exam.model, exam.clips, SMALL, 2, fast=None)
    odd.fast = None  # three clips are no whole batches: the model as it is
    assert odd.run(row)["clips"] == 3


def test_a_costly_row_takes_the_first_clips(exam):
    row = _rules.Row("oracle cag", selector="oracle", kept=SMALL.counts("cag"), clips=0.34)
    made = exam.run(row)
    assert made["clips"] == 1 and len(made["scores"]["bare"]) == 1
    assert made["kept"] == list(SMALL.counts("cag"))


def test_a_budget_is_measured_and_keeps_the_total(exam):
    row = _rules.Row("mass count budget", selector="mass", kept=SMALL.counts("count"),
                     settings={"budget": _rules.CALIBRATED})  # fmt: skip
    made = exam.run(row)
    assert sum(made["kept"]) == sum(SMALL.counts("count"))
    shares = np.array(exam.budget().shares)
    assert shares.shape == (2, 1) and exam.budget() is exam.budget()


def test_random_is_the_floor_of_recall_and_the_oracle_the_top(exam):
    tally = exam.judge(["random", "mean", "mass", "oracle"], 1, layers=[1])
    found = {r["selector"]: r for r in tally.means()}
    assert found["random"]["recall"] < min(found[n]["recall"] for n in ("mean", "mass"))
    assert all(r["oracle_ratio"] <= 1 + 1e-6 for r in found.values())
    assert found["oracle"]["oracle_ratio"] == pytest.approx(1)
    assert {c["chunk"] for c in tally.cells} == {2, 3, 4, 5, 6, 7}
    assert {c["step"] for c in tally.cells} == {0, 2, 4}
    assert tally.heads("mass").shape == (1, 1)


# ---- the store -----------------------------------------------------------------------------


def test_a_row_counts_under_its_key_only(tmp_path):
    path = tmp_path / "sub" / "rows.jsonl"
    store = _paired.Store(path, {"commit": "a", "clips": 2})
    store.put("dense", scores={"all": [1.0]})
    with path.open("a") as file:
        file.write('{"name": "torn", "ke')  # a killed run
    again = _paired.Store(path, {"clips": 2, "commit": "a"})
    assert again.names == ["dense"] and again["dense"]["scores"] == {"all": [1.0]}
    again.put("mass", scores={})
    assert _paired.Store(path, {"commit": "a", "clips": 2}).names == ["dense", "mass"]
    assert _paired.Store(path, {"commit": "b", "clips": 2}).names == []


def test_rows_are_run_once_and_in_time(exam, tmp_path):
    store, said = _paired.Store(tmp_path / "r.jsonl", {}), []
    todo = [_rules.Row("dense"), _rules.Row("mean cag", "main", "mean", SMALL.counts("cag"))]
    quality.run_rows(exam, todo, store, 1e9, said.append)
    assert store.names == ["dense", "mean cag"] and len(said) == 2
    quality.run_rows(exam, todo, store, 1e9, said.append)
    assert len(said) == 2
    slow = SimpleNamespace(dense={}, run=lambda row: {"scores": {}, "kept": [1], "clips": 1,
                                                      "seconds": 100.0})  # fmt: skip
    fresh = _paired.Store(tmp_path / "s.jsonl", {})
    quality.run_rows(slow, todo, fresh, 50.0, said.append)
    assert fresh.names == ["dense"] and said[-1] == "no time left for mean cag"
    short = [*todo, _rules.Row("less", "main", "mean", SMALL.counts("cag"), clips=0.25)]
    quality.run_rows(slow, short, _paired.Store(tmp_path / "t.jsonl", {}), 50.0, said.append)
    assert [line.split()[0] for line in said[-3:]] == ["dense", "no", "less"]


def test_rows_that_fail_or_find_no_time_are_told(exam, tmp_path, monkeypatch, capsys):
    def run(row):
        if row.name == "mean cag":
            raise RuntimeError("no memory")
        return exam.run(row)

    half = SimpleNamespace(dense={}, run=run, table=SMALL)
    todo = [_rules.Row("dense"), *(_rules.Row(f"mean {law}", "main", "mean", SMALL.counts(law))
                                   for law in ("cag", "uniform"))]  # fmt: skip
    facts = dict(device="d", commit="c", weights="w", torch="t", view=32, frame_tokens=64, clips=3,
                 block_k=16, block_q=16, sweep="quick", seed=0)  # fmt: skip

    def table(name, todo, *arguments):
        store = _paired.Store(tmp_path / f"{name}.jsonl", facts)
        monkeypatch.setattr(quality, "prepare", lambda args: (half, todo, store))
        results = str(tmp_path / name)
        code = quality.main(["--judged", "0", "--results", results, *arguments])
        return code, json.loads((tmp_path / f"{name}.json").read_text())["missing"]

    assert table("whole", todo[::2]) == (0, {"failed": {}, "no_time": []})
    capsys.readouterr()
    failed = {"mean cag": "RuntimeError: no memory"}
    assert table("failed", todo) == (1, {"failed": failed, "no_time": []})
    assert "failed: 1\nmean cag: RuntimeError: no memory" in capsys.readouterr().out
    late = {"failed": {}, "no_time": ["dense", "mean uniform"]}
    monkeypatch.setattr(quality.time, "perf_counter", iter(range(0, 10**6, 10)).__next__)
    assert table("late", todo[::2], "--seconds", "5") == (3, late)
    assert "no time was left for 2:\ndense, mean uniform" in capsys.readouterr().out


def test_only():
    every = _rules.rows(_rules.TABLES[64], selectors.names())
    picked = [r.name for r in quality.chosen(every, ["mass count", "lse"])]
    assert picked == ["dense", "mass count", "lse cag", "lse count steps", "lse count"]
    key = [r.name for r in quality.chosen(every, ["key"])]
    assert key == ["dense", "mean uniform", "mean cag", "mean count", "hsa cag", "mass cag",
                   "mass count", "mass count steps"]  # fmt: skip
    assert {r.group for r in quality.chosen(every, ["presets"])[1:]} == {"presets"}
    with pytest.raises(ValueError, match="no row best; there are dense, mean uniform"):
        quality.chosen(every, ["best"])


# ---- what is shown -------------------------------------------------------------------------


def made_up_store(path):
    """Two clips, dense and three rules, with differences known by hand."""
    store = _paired.Store(path, {})

    def put(name, bare, group="main", **more):
        scores = {"all": bare, "bare": bare, "back": [np.nan, bare[1]], "glyph_easy": [1, 0],
                  "glyph_hard": [0, 0], "ssim": [0.9, 0.8], "drift": [-0.5, -0.7]}  # fmt: skip
        scores |= {f"from_dense_{i}": [1e-4 * i, 3e-4 * i] for i in range(1, 7)}
        store.put(name, group=group, clips=2, planned=[1], kept=[16.0, 20, 24, 28, 31, 34],
                  scores=scores, seconds=1.5, **more)  # fmt: skip

    put("dense", [30.0, 20.0])
    put("hsa cag", [28.0, 17.0])
    put("mean cag", [29.0, 18.0])
    put("mean only 2 share", [29.0, 18.0], "chunks")
    cell = {
        "selector": "mean",
        "layer": 0,
        "chunk": 2,
        "step": 0,
        "recall": 0.5,
        "recall_p5": 0.1,
        "oracle_ratio": 0.9,
        "rel_l2": 0.3,
        "density": 0.12,
        "recall_heads": [0.4, 0.6],
    }
    cells = [cell, cell | {"recall": 0.7, "layer": 1}]
    store.put("recall", clips=1, layers=[0, 1], steps=[0], cells=cells, notes={})
    return store


FACTS = dict(device="x", commit="c", weights="w", torch="t", view=64, frame_tokens=256, block_k=16,
             block_q=16, sweep="quick", seed=0, clips=2)  # fmt: skip


def test_the_summary_by_hand(tmp_path):
    made = _quality_report.summary(made_up_store(tmp_path / "r.jsonl"), _rules.TABLES[64], FACTS)
    rows = {r["name"]: r for r in made["rows"]}
    assert list(rows) == ["dense", "hsa cag", "mean cag", "mean only 2 share"]
    assert rows["hsa cag"]["mean"]["bare"] == 22.5
    mean, low, high = rows["hsa cag"]["against_dense"]["bare"]
    assert (mean, low, high) == (-2.5, -3.0, -2.0)
    assert rows["hsa cag"]["against_dense"]["back"][0] == -3.0  # the first clip has no such region
    assert rows["hsa cag"]["density"] == pytest.approx(153 / 1296)
    first = made["questions"]["H3, the paper's frame stage against others at its schedule"]
    assert [(q["first"], q["second"], q["all"][0]) for q in first] == [
        ("hsa cag", "mean cag", -1.0)
    ]
    assert made["recall"]["means"][0]["recall"] == pytest.approx(0.6)
    assert made["recall"]["heads"]["mean"] == [[0.4, 0.6]] * 2


def test_the_files_of_a_table(tmp_path):
    store = made_up_store(tmp_path / "r.jsonl")
    made = _quality_report.summary(store, _rules.TABLES[64], FACTS)
    _quality_report.write(made, tmp_path / "out" / "quality-64")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "quality-64.json", "quality-64.png", "quality-64.txt",
    ]  # fmt: skip
    text = (tmp_path / "out" / "quality-64.txt").read_text()
    line = next(x for x in text.splitlines() if x.startswith("hsa cag "))
    assert "-2.50 [-3.00 -2.00]" in line and "0.50 0.00" in line
    assert "mean only 2 share            2.00" in text
    assert "hsa cag - mean cag" in text
    assert selectors.make("hsa").notes.split()[-1] in text
    assert json.loads((tmp_path / "out" / "quality-64.json").read_text())["facts"] == FACTS


def test_two_runs_beside_each_other(tmp_path):
    key = dict(weights="w", view=64, seed=0, sweep="quick", commit="a")
    ours = _paired.Store(tmp_path / "a.jsonl", key)
    theirs = _paired.Store(tmp_path / "b.jsonl", key | {"commit": "b"})
    other = _paired.Store(tmp_path / "b.jsonl", key | {"weights": "x"})
    for store, value in ((ours, 20.5), (theirs, 20.0), (other, 10.0)):
        scores = {n: [value, value + 1] for n in ("bare", "back", "all")}
        store.put("dense", clips=2, scores=scores)
    lines = _quality_report.beside(ours, _paired.load_rows(tmp_path / "b.jsonl"), "b")
    assert len(lines) == 4 and lines[3].split()[:3] == ["dense", "2", "+0.50"]


# ---- several trainings -----------------------------------------------------------------------


def training(path, weights, dense, hsa, **more):
    """Finished rows of one training: dense and hsa, three clips, ``all`` given."""
    facts = dict(weights=weights, view=64, seed=0, sweep="quick", clips=3, commit="c", device="d")
    store = _paired.Store(path, facts | more)
    for name, values in (("dense", dense), ("hsa cag", hsa)):
        scores = {n: list(values) for n in ("bare", "back", "all", "glyph_easy", "glyph_hard")}
        store.put(name, clips=len(values), scores=scores)
    return path


def test_trainings_are_joined_by_hand(tmp_path, capsys):
    a = training(tmp_path / "rows.jsonl", "w0", [20.0, 21, 22], [19.0, 20, 21])  # -1
    training(a, "w1", [30.0, 31, 32], [29.0, 29, 29])  # -2
    b = training(tmp_path / "b.jsonl", "w2", [10.0, 11, np.nan], [7.0, 8, np.nan])  # -3
    assert quality.main(["--join", str(a), str(b), "--results", str(tmp_path / "joined")]) == 0
    made = json.loads((tmp_path / "joined.json").read_text())
    assert [t["weights"] for t in made["trainings"]] == ["w0", "w1", "w2"]
    (row,) = made["rows"]
    assert row["name"] == "hsa cag"
    assert [e[0] for e in row["all"]["each"]] == [-1, -2, -3]
    assert (row["all"]["low"], row["all"]["high"], row["all"]["spread"]) == (-3, -1, 1)
    assert row["all"]["margin"] == pytest.approx(4.303 / 3**0.5)  # 97.5 % of t with two degrees
    assert row["all"]["each"][1] == [-2, -3, -1]  # over the clips of a training
    shown = capsys.readouterr().out
    assert "hsa cag - dense             -2.00 ±2.48 (-3.00 -1.00)" in shown
    assert (tmp_path / "joined.txt").read_text().strip() == shown.strip()


def test_what_cannot_be_joined_is_told(tmp_path, capsys):
    a = training(tmp_path / "a.jsonl", "w0", [20.0], [19.0])
    assert quality.main(["--join", str(a)]) == 2
    assert "expected rows of at least two trainings, got 1" in capsys.readouterr().err
    b = training(tmp_path / "b.jsonl", "w1", [20.0], [19.0], view=128)
    assert quality.main(["--join", str(a), str(b)]) == 2
    assert "--join: expected rows of one view, got 64 and 128" in capsys.readouterr().err


def test_a_measure_without_a_value_is_a_dash(tmp_path, capsys):
    for name in "ab":
        training(tmp_path / f"{name}.jsonl", name, [np.nan] * 2, [np.nan] * 2)
    assert quality.main(["--join", *(str(tmp_path / f"{n}.jsonl") for n in "ab")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["dense", "-/-", "-/-", "-/-"] in lines
    assert "hsa cag - dense - - - - -".split() in lines


def test_rows_without_weights_are_not_joined(tmp_path, capsys):
    store = _paired.Store(tmp_path / "a.jsonl", {"view": 64})
    store.put("dense", scores={})
    assert quality.main(["--join", str(store.path)]) == 2
    assert "--join: expected rows that name their weights, got dense" in capsys.readouterr().err


def test_a_plan_adds_up_the_seconds_of_an_earlier_run(tmp_path, capsys):
    store = _paired.Store(tmp_path / "r.jsonl", {"view": 64})
    for name, clips, seconds in (("dense", 4, 9.0), ("mass count", 4, 8.0), ("mass cag", 4, 4.0)):
        store.put(name, clips=clips, seconds=seconds, scores={})
    arguments = ["--plan", str(store.path), "--clips", "8", "--only", "mass count", "mass cag"]
    assert quality.main(arguments) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[-2] for line in lines] == ["18.0", "26.0", "34.0"]  # rows: a second a clip
    assert quality.main([*arguments, "--view", "128"]) == 2


# ---- captured calls ------------------------------------------------------------------------


def planted(folder, chunk, seed):
    """A call in which every query block's mass is on four known blocks of other frames."""
    draw = np.random.default_rng(seed)
    tokens, dim = 64, 32
    k = 0.3 * draw.standard_normal((1, 3 * chunk * tokens, 1, dim))
    q = 0.3 * draw.standard_normal((1, 3 * tokens, 1, dim))
    for row in range(12):  # query blocks of 16
        mark = draw.standard_normal(dim)
        mark *= 6 / np.linalg.norm(mark)
        q[0, 16 * row : 16 * row + 16, 0] += mark
        for block in draw.choice(3 * chunk * 4, 4, replace=False):
            k[0, 16 * block : 16 * block + 16, 0] += mark
    tensors = [torch.tensor(x, dtype=torch.float32) for x in (q, k, k)]
    facts = capturing.Facts(
        layer=0, chunk=chunk, step=0, number=0, first_frame=3 * (chunk - 1), frame_tokens=tokens,
        grid=(8, 8), frames_per_chunk=3, window=None, scale=dim**-0.5, model="Planted",
    )  # fmt: skip
    return capturing.save(folder, capturing.Captured(*tensors, facts))


def test_the_captured_table_finds_planted_blocks(tmp_path, capsys):
    for chunk in (3, 4):
        planted(tmp_path, chunk, chunk)
    arguments = ["--captured", str(tmp_path), "--only", "mass", "mean", "random", "oracle", "sta",
                 "--sparsity", "0.85", "--block-q", "16", "--block-k", "16", "--device", "cpu",
                 "--results", str(tmp_path / "made")]  # fmt: skip
    assert quality.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "2 calls of" in shown and "15% of the key blocks kept" in shown
    record = json.loads((tmp_path / "made.json").read_text())
    found = {r["selector"]: r for r in record["means"]}
    assert found["oracle"]["recall"] > 0.7
    assert found["mass"]["oracle_ratio"] > 0.98 and found["mean"]["oracle_ratio"] > 0.95
    assert found["random"]["recall"] < 0.3 and found["sta"]["recall"] < 0.5
    assert {r["calls"] for r in record["means"]} == {2}


def test_a_selector_that_cannot_is_left_out_with_its_reason(tmp_path):
    call = capturing.load(planted(tmp_path, 3, 0))
    blind = SimpleNamespace(**vars(call) | {"facts": SimpleNamespace(
        **{f: getattr(call.facts, f) for f in call.facts.__dataclass_fields__} | {"grid": None}
    )})  # fmt: skip
    notes = {}
    found = _judge.judge(blind, ["sta", "mass"], sparsity=0.8, block_q=16, block_k=16, notes=notes)
    assert list(found) == ["mass"] and "grid" in notes["sta"]
    assert "oracle" not in found


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--sparsity", "1.5"], "--sparsity: expected a number from 0 to 0.999, got 1.5"),
        (["--block-q", "8"], "--block-q: expected an integer from 16 to 128, got 8"),
        (["--block-k", "24"], "--block-k: invalid choice: 24 (choose from 16, 32, 64, 128)"),
        (["--clips", "0"], "--clips: expected an integer from 1 to 1000000, got 0"),
        (["--only", "mass", "best"], "--only: no selector best; there are "),
        (["--captured", "MISSING"], "folder: expected .safetensors files of a capture, got"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_wrong_arguments_get_a_sentence_before_any_work(
    arguments, sentence, tmp_path, monkeypatch, capsys
):
    planted(tmp_path, 3, 0)
    monkeypatch.setattr(quality, "judge", lambda *_, **__: pytest.fail("work was begun"))
    arguments = [a.replace("MISSING", str(tmp_path / "missing")) for a in arguments]
    try:
        code = quality.main(["--captured", str(tmp_path), "--device", "cpu", *arguments])
    except SystemExit as end:  # argparse's way out
        code = end.code
    shown = capsys.readouterr()
    assert code == 2 and sentence in shown.err and not shown.out


def test_an_unknown_row_is_told_before_the_model_is_made(monkeypatch, capsys):
    monkeypatch.setattr(world, "load_world", lambda *_, **__: pytest.fail("work was begun"))
    assert quality.main(["--only", "best", "--device", "cpu"]) == 2
    assert "--only: no row best; there are dense" in capsys.readouterr().err
