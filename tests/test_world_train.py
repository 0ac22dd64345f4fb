"""Training in cut runs, checkpoints that survive, weights that ship."""

import json
import math
import re
import shutil

import pytest
import torch
from small_wan import one_thread  # noqa: F401

from lightforcing import world
from lightforcing.world import __main__ as command
from lightforcing.world import checkpoint, train, weights
from lightforcing.world.model import MODELS, new_model
from lightforcing.world.muon import Muon, orthogonal
from lightforcing.world.recipe import RECIPES, Stage, shortened
from lightforcing.world.train import Trainer, trained

FOREVER = 1e9
SHORT = (
    Stage(32, FOREVER, 1, steps=4, short=0.5, ema=0.5),
    Stage(64, FOREVER, 1, steps=2, mixed=2, ema=0.5),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, cut once on the way; its folder."""
    folder = tmp_path_factory.mktemp("run")
    first = Trainer(folder, model="tiny", recipe=SHORT, seed=4)
    for _ in range(3):
        first.step()
    assert not first.run(seconds=-1.0)
    second = Trainer(folder, model="tiny", recipe=SHORT, seed=4)
    assert second.at["step"] == 3 and second.at["clips"] == first.at["clips"]
    assert second.run()
    return folder


# ---- parts ---------------------------------------------------------------------------


def test_orthogonal_steps_have_singular_values_near_one():
    draw = torch.Generator().manual_seed(0)
    for shape in ((2, 48, 48), (2, 96, 32), (2, 32, 96)):
        x = torch.randn(shape, generator=draw)
        y = orthogonal(x)
        values = torch.linalg.svdvals(y)
        assert y.shape == x.shape and 0.3 < values.min() and values.max() < 1.3
        # The directions stay: x and its nearest orthogonal matrix agree in sign everywhere.
        u, _, v = torch.linalg.svd(x, full_matrices=False)
        assert (torch.einsum("bij,bij->b", u @ v, y) / min(shape[1:]) > 0.7).all()


def test_muon_steps_matrices_of_one_shape_together():
    draw = torch.Generator().manual_seed(1)
    matrices = [torch.randn(s, generator=draw) for s in ((8, 4), (8, 4), (4, 4))]
    before = [w.clone() for w in matrices]
    for w in matrices:
        w.grad = torch.randn(w.shape, generator=draw)
    muon = Muon(matrices, lr=0.1, momentum=0.5, decay=0.2)
    muon.step()
    for w, old in zip(matrices, before, strict=True):
        # The first buffer is half the gradient, and so is their Nesterov mix but for a factor.
        update = orthogonal(w.grad[None])[0] * max(1, w.shape[0] / w.shape[1]) ** 0.5
        assert torch.allclose(w, old * (1 - 0.1 * 0.2) - 0.1 * update, atol=5e-3)
    other = Muon([w.clone() for w in matrices], lr=0.1)
    other.load(muon.state())
    assert len(muon.state()) == 2
    for (_, a), (_, b) in zip(muon.groups, other.groups, strict=True):
        assert torch.allclose(a, b, rtol=1e-2, atol=1e-3)


def test_pieces_of_a_checkpoint_are_small_and_never_mixed(tmp_path):
    path = tmp_path / "x.pt"
    assert checkpoint.load(path) is None
    old, new = ({"a": torch.full((5000,), float(n)), "n": n} for n in (1, 2))
    names = checkpoint.save(old, path, piece=9000)
    assert len(names) == 3 and all(p.stat().st_size <= 9000 for p in names)
    assert checkpoint.load(path)["n"] == 1
    torn = names[1].read_bytes()
    checkpoint.save(new, path, piece=9000)
    assert torch.equal(checkpoint.load(path)["a"], new["a"])
    names[1].write_bytes(torn)
    with pytest.raises(ValueError, match="the 3 pieces of x.pt are not those of one whole"):
        checkpoint.load(path)
    assert checkpoint.save(new, path) == [path]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.pt"]
    checkpoint.save(new, path, piece=30_000)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.pt.00"]


def test_a_save_that_dies_leaves_the_last_one(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    checkpoint.save({"n": 1}, path)

    def dies(*names):
        raise OSError("disk is gone")

    monkeypatch.setattr(checkpoint.os, "replace", dies)
    with pytest.raises(OSError, match="disk is gone"):
        checkpoint.save({"n": 2}, path)
    assert checkpoint.load(path) == {"n": 1}


# ---- runs ----------------------------------------------------------------------------


def test_a_cut_run_goes_on_as_if_nothing_had_happened(tmp_path):
    whole = Trainer(tmp_path / "a", model="tiny", recipe=SHORT)
    whole.step()
    whole.save()
    half, at = trained(tmp_path / "a")
    assert at["step"] == 1 and half.config == whole.ema.config
    for a, b in zip(whole.ema.parameters(), half.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=2**-8, atol=1e-6)
    other = Trainer(tmp_path / "a", model="tiny", recipe=SHORT)
    for a, b in zip(whole.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
    losses = [[t.step().item() for _ in range(2)] for t in (whole, other)]
    # The same clips and noise; only Muon's momenta were rounded.
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[0][0] != losses[0][1]


def test_a_run_ends_with_averaged_weights_and_a_log(run):
    model, at = trained(run)
    assert at["total"] == 6
    fresh = new_model("tiny", seed=4)
    assert any(
        not torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True)
    )
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    events = [line.get("event") for line in log if "event" in line]
    assert events == ["start", "cut", "resume", "stage over", "stage over", "trained"]
    assert log[-1]["at"]["total"] == 6 and log[-1]["at"]["stage"] == 2
    # 2 steps of 3 packed short clips and 4 of one clip.
    assert log[-1]["at"]["clips"] == 2 * 3 + 4
    probes = [line for line in log if "probe" in line]
    assert [p["view"] for p in probes] == [32, 64] and probes[0]["back"] is None
    assert all(0 < p["all"] < 40 for p in probes)


def test_training_learns(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "WARM_UP", 4)
    stage = Stage(32, FOREVER, 1, steps=FOREVER)
    trainer = Trainer(tmp_path, model="tiny", recipe=(stage,))
    losses = [trainer.step().item() for _ in range(14)]
    assert sum(losses[-4:]) < 0.93 * sum(losses[:4]), losses


def test_recipes_fit_the_time():
    for name in ("narrow", "full"):
        assert sum(stage.seconds for stage in RECIPES[name]) <= 660
    short = shortened(RECIPES["narrow"], [10, 20])
    assert [s.seconds for s in short] == [10, 20] and short[0].batch == RECIPES["narrow"][0].batch
    with pytest.raises(ValueError, match="stages: expected 2 times, got 1"):
        shortened(RECIPES["narrow"], [10])


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    trainer = Trainer(tmp_path, model="tiny", recipe=SHORT)
    with pytest.raises(RuntimeError, match="loss: expected a finite number, got nan"):
        trainer._report(math.nan)


# ---- weights -------------------------------------------------------------------------


def test_eight_bits_lose_half_a_step_at_most():
    state = new_model("tiny", seed=2).state_dict()
    packed = weights.quantised(state)
    back = weights.restored(packed)
    assert set(back) == set(state)
    for name, weight in state.items():
        large = name.startswith(weights.LARGE) and weight.dim() == 2
        assert (packed[name].dtype == torch.int8) == large
        step = packed[name + weights.SCALE].float()[:, None] if large else weight.abs() * 2**-10
        assert ((back[name] - weight).abs() <= 0.505 * step + 1e-7).all(), name


def test_export_evaluate_and_render(run, tmp_path, capsys):
    out = str(tmp_path / "export")
    sizes = ["--view", "32", "--clips", "2", "--device", "cpu"]
    assert command.main(["export", "--folder", str(run), "--out", out, *sizes]) == 1  # untrained
    (failed,) = tmp_path.iterdir()
    assert f"the failed export is in {failed}" in capsys.readouterr().err
    failed.rename(out)
    card = world.card(out)
    assert card["run"]["steps"] == 6 and card["run"]["finished"]
    assert [c["from_step"] for c in card["run"]["commands"]] == [0, 3]
    assert card["run"]["seed"] == 4 and card["run"]["recipe"][1]["view"] == 64
    assert card["gates"][0]["clips"] == 2 and not card["gates"][0]["ok"]
    page = (tmp_path / "export" / weights.PAGE).read_text()
    assert "FAILS" in page and card["sha256"] in page
    kept, shipped = trained(run)[0], world.load_world(out, device="cpu")
    clip = world.clips(1, view=32, frames=9)
    a, b = (world.rollout(m, clip)[:, 3:] for m in (kept, shipped))
    assert 0 < (a - b).abs().max() < 0.02
    figures = tmp_path / "gates.json"
    assert command.main(["evaluate", "--weights", out, "--json", str(figures), *sizes]) == 1
    assert json.loads(figures.read_text())[0]["rows"] == card["gates"][0]["rows"]
    pictures = str(tmp_path / "pictures")
    arguments = ["render", "--weights", out, "--out", pictures, "--view", "32", "--device", "cpu"]
    assert command.main([*arguments, "--rules", "dense", "fast"]) == 0
    names = {p.name for p in (tmp_path / "pictures").iterdir()}
    assert names == {"contact-sheet.png", "video.gif", "video.mp4"}
    assert "dB" in capsys.readouterr().out


def test_an_export_replaces_nothing_before_its_gates_hold(run, tmp_path, monkeypatch, capsys):
    folder, shipped = tmp_path / "run", weights.FOLDER / weights.FILE
    shutil.copytree(run, folder)
    before, arguments = shipped.read_bytes(), ["export", "--folder", str(folder)]
    (folder / "export").mkdir()
    old = folder / "export" / weights.FILE
    old.write_text("old")
    result = {"view": 32, "clips": 2, "gates": [], "rows": {}}
    monkeypatch.setattr(command, "_examined", lambda *_: [result | {"ok": False}])
    assert command.main(arguments) == 1 and old.read_text() == "old"
    assert "a gate failed" in capsys.readouterr().err
    (failed,) = folder.glob("export.unproven-*")
    shutil.rmtree(failed)
    monkeypatch.setattr(command, "_examined", lambda *_: [result | {"ok": True}])
    assert command.main(arguments) == 0 and not list(folder.glob("export.unproven-*"))
    assert world.load_world(folder / "export", device="cpu").config == MODELS["tiny"]
    assert {p.name for p in old.parent.iterdir()} == {
        weights.FILE, weights.CARD, weights.PAGE, "log.jsonl",
    }  # fmt: skip
    assert shipped.read_bytes() == before
    with pytest.raises(SystemExit, match="2"):
        command.main([*arguments, "--out", str(folder / "log.jsonl")])
    assert "--out: expected a folder" in capsys.readouterr().err


def test_weights_are_checked_by_hash(run, tmp_path, capsys):
    model = weights.export(trained(run)[0], tmp_path, {})
    assert torch.equal(
        model.blocks[0].self_attn.q.weight,
        world.load_world(tmp_path, device="cpu").blocks[0].self_attn.q.weight,
    )
    assert world.load_world(tmp_path, device="cpu", dtype=torch.float16).dtype == torch.float16
    path = tmp_path / weights.FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"folder: {weights.FILE} has hash .* but its card says"):
        world.load_world(tmp_path)
    assert command.main(["evaluate", "--weights", str(tmp_path / "none")]) == 2
    assert "no world.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, view, clips, batch, said",
    [
        ("", [64], [16], 2, "16 clips of 64 px on a CPU, .* takes hours"),
        ("--view 128 --clips 1", [128], [1], 2, "1 clips of 128 px on a CPU, .* make it shorter"),
        ("--view 64 128 --clips 8 2 --batch 4", [64, 128], [8, 2], 4, "8 clips of 64 px and 2 "),
        ("GPU", [64, 128], [256, 64], 64, "$"),
        ("GPU --view 64", [64], [256], 64, "$"),
    ],
)
def test_a_cpu_examines_fewer_clips_and_says_so(
    words, view, clips, batch, said, monkeypatch, capsys
):
    monkeypatch.setattr(command, "_device", lambda options: "cuda" if "GPU" in words else "cpu")
    options = command.parser().parse_args(["evaluate", *words.replace("GPU", "").split()])
    command._sizes(options)
    assert (options.view, options.clips, options.batch) == (view, clips, batch)
    assert re.match(said, capsys.readouterr().err)


def test_too_large_a_file_is_refused_in_the_package_only(run, tmp_path, monkeypatch):
    model = trained(run)[0]
    monkeypatch.setattr(weights, "MOST_BYTES", 1000)
    assert weights.export(model, tmp_path / "elsewhere", {}).config == MODELS["tiny"]
    monkeypatch.setattr(weights, "FOLDER", tmp_path / "world" / "weights")
    with pytest.raises(ValueError, match="model: expected at most 1000 bytes in 8 bits, got"):
        weights.export(model, tmp_path / "world" / "weights.unproven-1", {})


# ---- what ships ----------------------------------------------------------------------


def test_the_card_of_the_shipped_weights_is_true():
    card = world.card()
    assert card["bytes"] == (weights.FOLDER / weights.FILE).stat().st_size <= weights.MOST_BYTES
    assert [(g["view"], g["clips"], g["ok"]) for g in card["gates"]] == [
        (64, 256, True),
        (128, 64, True),
    ]
    assert all(gate["ok"] for result in card["gates"] for gate in result["gates"])
    log = [json.loads(line) for line in (weights.FOLDER / "log.jsonl").read_text().splitlines()]
    end = log[-1]
    assert end["event"] == "trained" and end["at"]["wall"] < 660
    told = weights.history(log, end["at"], card["model"]["weights"])["run"]
    assert card["run"] == told and told["finished"]
    assert (weights.FOLDER / weights.PAGE).read_text() == weights.page(card)


def test_the_shipped_weights_continue_a_clip():
    model = world.load_world(device="cpu")
    assert model.config == MODELS["narrow"]
    clip = world.clips(1, frames=9)
    scores = world.metrics.score(world.rollout(model, clip), clip)
    assert scores["bare"] > 23 and scores["c1"] > 22
    assert scores["glyph_easy"] == scores["glyph_hard"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("train --seconds -5", "--seconds: expected seconds, above 0"),
        ("train --seconds nan", "--seconds: expected seconds, above 0"),
        ("train --stages 10", "stages: expected 2 times, got 1"),
        ("train --stages 10 -1", "--stages: expected seconds, above 0"),
        ("train --seed -1", "--seed: expected an integer from 0"),
        ("train --piece 0", "--piece: expected an integer from 1"),
        ("train --folder FILE", "--folder: expected a folder .*, got .*, which is a file"),
        ("train --folder RUN --model narrow", "model: expected 'tiny', that of the run in"),
        ("train --folder RUN --model tiny --seed 7", "seed: expected .*, that of the run in"),
        ("train --device nowhere", "--device: expected cpu, or a GPU"),
        ("train --device meta", "--device: expected cpu, or a GPU"),
        ("evaluate --clips 0 0", "--clips: expected an integer from 1"),
        (
            "evaluate --view 64 128 --clips 4 4 4",
            "--clips: expected one number, or one for each of 2",
        ),
        ("evaluate --view 60", "--view: expected multiples of 32, got 60"),
        ("evaluate --view 0", "--view: expected an integer from 1"),
        ("evaluate --batch 0", "--batch: expected an integer from 1"),
        ("evaluate --weights FILE", "source: expected a .pt, .pth, .bin or .safetensors file"),
        ("evaluate --weights FILE.safetensors", "source: expected a safetensors file, got"),
        ("evaluate --weights FILE.pt", "source: expected weights that torch.save wrote"),
        ("evaluate --json FILE/x.json", "--json: expected a file in a folder that is there"),
        ("evaluate --json .", "--json: expected a file in a folder that is there"),
        ("export --folder none", "folder: no checkpoint in none"),
        ("export --folder RUN --out FILE", "--out: expected a folder"),
        ("render --number -1", "--number: expected an integer from 0"),
        ("render --rules fast nonsense", "--rules: expected some of dense, .*, got nonsense"),
        ("render --out FILE", "--out: expected a folder .*, got .*, which is a file"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments, words, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("file", "file.safetensors", "file.pt"):
        (tmp_path / name).write_text("nothing")
    words_given = arguments.replace("RUN", str(run)).replace("FILE", str(tmp_path / "file"))
    try:
        status = command.main(words_given.split())
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert re.search(words, capsys.readouterr().err.splitlines()[-1])


def test_the_table_says_what_guessing_would_reach(run, tmp_path, capsys):
    sizes = ["--view", "32", "--clips", "1", "--batch", "2"]
    command.main(["evaluate", "--weights", str(run / "ema.safetensors"), *sizes])
    told = capsys.readouterr()
    assert "a glyph is one of 16: chance is 0.06, in % 6.25" in told.out
    assert "32 px: 100%" in told.err and "1/1" in told.err
