"""The paired VBench run, with a toy pipeline and made-up scores in place of the real ones."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import fake_ar as ar
import numpy as np
import pytest
import torch
from fake_ar import nothing_is_left_behind  # noqa: F401

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import _paired  # noqa: E402
import vbench  # noqa: E402

SIZE = (2, 4, 4)  # 32 numbers: one token of the toy model


class Pipeline:
    """Has a model and ``inference``, and draws from the global generator as real ones do."""

    def __init__(self):
        self.generator = ar.make()
        self.asked = []

    def inference(self, noise, text_prompts):
        self.asked.append((noise.clone(), text_prompts))
        cache, out = ar.new_cache(self.generator), []
        for start in range(0, noise.shape[1], 3):
            x = noise[:, start : start + 3].flatten(2).repeat_interleave(ar.T, 1)
            x = x + 0.1 * torch.randn_like(x)
            out.append(self.generator(x, kv_cache=cache, current_start=start * ar.T))
        video = torch.cat(out, 1).unflatten(1, (-1, ar.T))[:, :, :18]  # 576 numbers a frame
        video = video.reshape(1, -1, 3, 12, 16)
        return (2 * video).sigmoid()


@pytest.fixture
def made(tmp_path):
    """Videos of three arms in .npy files, and the pipeline that made them."""
    pipeline = Pipeline()
    videos = vbench.plan(["a boat", "a tree"], ["A small boat.", "An old tree."], samples=2)
    arms = ["dense", "fast:block_q=16,block_k=16", "balanced:sparsity=0"]
    made = vbench.generate(pipeline, videos, tmp_path, arms, 9, SIZE, save, lambda line: None)
    return SimpleNamespace(folder=tmp_path, pipeline=pipeline, videos=videos, arms=arms, files=made)


def save(path, frames):
    assert frames.dtype == np.uint8
    with open(path, "wb") as file:
        np.save(file, frames)


def test_a_plan_names_files_by_prompt_and_seeds_by_prompt_and_index():
    prompts = ["a boat", "a tree", "a boat"]
    made = vbench.plan(prompts, ["A small boat.", "An old tree.", "Again."], samples=2)
    assert [m["file"] for m in made] == ["a boat-0.mp4", "a boat-1.mp4", "a tree-0.mp4",
                                         "a tree-1.mp4"]  # fmt: skip
    assert made[0]["text"] == "A small boat." and len({m["seed"] for m in made}) == 4
    assert vbench.plan(["a tree"], samples=2)[1]["seed"] == made[3]["seed"]
    assert vbench.plan(["a tree"], seed=1)[0]["seed"] != made[2]["seed"]
    with pytest.raises(ValueError, match="texts: expected 1 lines as prompts has, got 2"):
        vbench.plan(["a"], ["b", "c"])


def test_the_plan_command_writes_it(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("one\ntwo\n\nthree\n")
    code = vbench.main(["plan", str(tmp_path / "plan.json"), "--prompts", str(tmp_path / "p.txt"),
                        "--every", "2", "--samples", "3"])  # fmt: skip
    assert code == 0 and "6 videos planned" in capsys.readouterr().out
    made = json.loads((tmp_path / "plan.json").read_text())
    assert [m["text"] for m in made[::3]] == ["one", "three"]


def test_arms():
    assert vbench.arm_settings("dense") is None
    assert vbench.arm_settings("fast") == {"preset": "fast"}
    assert vbench.arm_settings("fast:sparsity=0.9,score=mean,hierarchy=true") == {
        "preset": "fast", "sparsity": 0.9, "score": "mean", "hierarchy": True,
    }  # fmt: skip
    with pytest.raises(ValueError, match="expected name=value after the colon, got 'sparse'"):
        vbench.arm_settings("fast:sparse")


def test_arms_share_their_noise_and_a_patch_without_sparsity_changes_nothing(made):
    assert len(made.files) == 12
    dense, sparse, zero = (made.folder / n for n in ("dense", "fast-block_q=16-block_k=16",
                                                     "balanced-sparsity=0"))  # fmt: skip
    for video in made.videos:
        a, b, c = (np.load(p / video["file"]) for p in (dense, sparse, zero))
        assert a.shape == (9, 12, 16, 3)
        assert np.array_equal(a, c) and not np.array_equal(a, b)
        assert np.array_equal(a[:3], b[:3])  # the first chunk is dense
    texts = [t for _, t in made.pipeline.asked]
    assert texts[:4] == [["A small boat."]] * 2 + [["An old tree."]] * 2
    for (one, _), (two, _) in zip(made.pipeline.asked[:4], made.pipeline.asked[4:8], strict=True):
        assert torch.equal(one, two)
    assert "24 of 24 calls" not in (sparse / "report.txt").read_text()
    assert "sparse" in (sparse / "report.txt").read_text()


def test_what_exists_is_not_made_again(made):
    before = len(made.pipeline.asked)
    (made.folder / "dense" / "a tree-1.mp4").unlink()
    again = vbench.generate(made.pipeline, made.videos, made.folder, made.arms, 9, SIZE, save)
    assert [p.name for p in again] == ["a tree-1.mp4"]
    assert len(made.pipeline.asked) == before + 1


# ---- scores ------------------------------------------------------------------------------


def put_scores(folder, arm, values):
    """As VBench writes them: a score, and one for every video."""
    (folder / arm).mkdir(exist_ok=True)
    for dimension, each in values.items():
        home = folder / f"{arm}.vbench" / dimension
        home.mkdir(parents=True)
        videos = [
            {"video_path": f"x/{name}", "video_results": score} for name, score in each.items()
        ]
        record = {dimension: [float(np.mean(list(each.values()))), videos]}
        (home / "results_eval_results.json").write_text(json.dumps(record))


def test_the_table_pairs_videos(tmp_path):
    dense = {"a.mp4": 0.80, "b.mp4": 0.60}
    put_scores(tmp_path, "dense", {"imaging_quality": dense})
    put_scores(tmp_path, "fast", {"imaging_quality": {"a.mp4": 0.79, "b.mp4": 0.59}})
    lines = vbench.table(tmp_path)
    assert lines[1].split() == ["imaging_quality", "70.00"]
    assert lines[3].split() == [
        "imaging_quality", "69.00", "-1.00", "-1.00", "[-1.00", "-1.00]", "of", "2", "videos",
    ]  # fmt: skip
    assert len(lines) == 4  # no totals from one dimension
    with pytest.raises(FileNotFoundError, match="results of the arm dense"):
        vbench.table(tmp_path / "dense")


def test_totals_by_hand():
    scores = {d: high for d, (_, high) in (vbench.QUALITY | vbench.SEMANTIC).items()}
    assert vbench.totals(scores) == {"quality": 1.0, "semantic": 1.0, "total": 1.0}
    scores["dynamic_degree"] = 0.0  # half of 6.5 parts
    scores["scene"] = 0.4111  # half of 9 parts
    made = vbench.totals(scores)
    assert made["quality"] == pytest.approx(1 - 0.5 / 6.5)
    assert made["semantic"] == pytest.approx(1 - 0.5 / 9)
    assert made["total"] == pytest.approx((4 * made["quality"] + made["semantic"]) / 5)
    del scores["scene"]
    assert vbench.totals(scores)["total"] is None


def test_score_runs_vbench_once_for_each_arm_and_dimension(tmp_path, monkeypatch, capsys):
    for name in ("fast", "dense"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(vbench.shutil, "which", lambda name: None)
    assert vbench.score(tmp_path) == 2 and "pip install vbench" in capsys.readouterr().err
    monkeypatch.setattr(vbench.shutil, "which", lambda name: f"/bin/{name}")
    calls = []

    def run(command):
        calls.append(command)
        out = Path(command[command.index("--output_path") + 1])
        (out / "x_eval_results.json").write_text("{}")
        return SimpleNamespace(returncode=0)

    asked = ["scene", "color"]
    assert vbench.score(tmp_path, tmp_path / "info.json", asked, run) == 0
    assert [c[:2] for c in calls] == [["/bin/vbench", "evaluate"]] * 4
    assert [Path(c[3]).name for c in calls] == ["dense", "dense", "fast", "fast"]
    assert vbench.score(tmp_path, None, asked, run) == 0 and len(calls) == 4
    assert vbench.score(tmp_path, None, ["scene", "color", "human_action"],
                        lambda c: SimpleNamespace(returncode=1)) == 1  # fmt: skip


# ---- likeness ----------------------------------------------------------------------------


def test_pixel_frames_of_a_chunk():
    """81 frames are 21 latent ones: 1 + 2 * 4 in the first chunk, 3 * 4 in the others."""
    parts = vbench.chunk_frames(81)
    assert [(p.start, p.stop) for p in parts] == [
        (0, 9), (9, 21), (21, 33), (33, 45), (45, 57), (57, 69), (69, 81),
    ]  # fmt: skip


def test_likeness_by_hand():
    dense = np.random.default_rng(0).integers(0, 256, (21, 16, 24, 3), np.uint8)
    video = dense.copy()
    video[9:] ^= 1  # one level in every pixel from the second chunk on
    found = vbench.likeness(video, dense, lambda a, b: (a - b).abs().mean((1, 2, 3)))
    assert found["psnr"][0] == pytest.approx(80) and found["ssim"][0] == pytest.approx(1)
    assert found["psnr"][1] == pytest.approx(20 * np.log10(255), abs=1e-3)
    assert found["lpips"] == pytest.approx([0, 1 / 127.5], abs=1e-6)
    assert 0.99 < found["ssim"][1] < 1
    with pytest.raises(ValueError, match="video: expected the shape"):
        vbench.likeness(video[1:], dense)


def test_compare_reads_the_arms(made):
    lines = vbench.compare(made.folder, np.load)
    assert lines[0].startswith("balanced-sparsity=0 against dense, 4 videos")
    assert lines[1].split()[:2] == ["psnr", "80.000"]
    sparse = lines[4].split()
    assert float(sparse[1]) < 80 and sparse[0] == "psnr"


def test_an_interval_covers_the_mean_and_depends_on_the_sample_only():
    draw = np.random.default_rng(5).normal(1.0, 2.0, 400)
    mean, low, high = _paired.interval(draw)
    assert mean == pytest.approx(draw.mean())
    assert low < mean < high and high - low == pytest.approx(2 * 1.96 * 2 / 20, rel=0.2)
    assert _paired.interval(draw) == (mean, low, high)
    assert _paired.interval([np.nan, 2.0]) == (2.0, 2.0, 2.0)
    assert _paired.interval([np.nan]) == (None, None, None)
    assert _paired.difference([3.0, 4.0, 9.0], [1.0, 2.0]) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize("tool", ["attention_share", "bench", "quality", "self_forcing", "tuning",
                                  "vbench", "world"])  # fmt: skip
def test_an_option_is_never_guessed_from_its_beginning(tool, monkeypatch):
    """As --frames of `explain` once was taken for --frames-per-chunk."""
    import argparse
    import importlib

    name = "lightforcing.world.__main__" if tool == "world" else tool
    module, made = importlib.import_module(name), []
    original = argparse.ArgumentParser.__init__

    def init(self, *args, **options):
        original(self, *args, **options)
        made.append(self)

    monkeypatch.setattr(argparse.ArgumentParser, "__init__", init)
    with pytest.raises(SystemExit):
        module.main(["--no-such-option"])
    assert made and not any(p.allow_abbrev for p in made)


def test_generate_checks_what_it_was_given_before_it_loads_anything(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vbench, "self_forcing", lambda *_: pytest.fail("loaded"))
    find = vbench.importlib.util.find_spec
    absent = lambda name: None if name == "omegaconf" else find(name)  # noqa: E731
    monkeypatch.setattr(vbench.importlib.util, "find_spec", absent)
    plan, weights = tmp_path / "plan.json", tmp_path / "weights.pt"
    common = ["generate", str(plan), str(tmp_path / "v"), "--checkout", str(tmp_path / "checkout"),
              "--config", "c.yaml", "--checkpoint", str(weights), "--arms", "dense"]  # fmt: skip

    def told(*more):
        assert vbench.main([*common, *more]) == 2
        return capsys.readouterr().err

    assert "plan.json" in told()
    for text in ("[]", "{", '[{"file": "a.mp4"}]'):
        plan.write_text(text)
        assert "plan: expected what `vbench.py plan` wrote" in told()
    plan.write_text(json.dumps(vbench.plan(["a cat"])))
    assert "--checkout: expected a folder" in told()
    (tmp_path / "checkout").mkdir()
    assert "--checkpoint: expected a file" in told()
    weights.write_text("")
    assert "--arms: expected dense or one of" in told("best")
    assert "--arms: fast:sparsity=3: sparsity: expected a number in [0, 1)" in told(
        "fast:sparsity=3"
    )
    assert "--arms: fast:nix=1: nix: no such setting" in told("fast:nix=1")
    assert "generate needs omegaconf: pip install omegaconf" in told("fast:law=linear,strict=true")
    assert "generate needs omegaconf: pip install omegaconf" in told("fast")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("plan P --prompts EMPTY", "--prompts: expected a line a prompt, got none in"),
        ("plan P --prompts TWO --texts EMPTY", "--texts: expected 2 lines as --prompts has, got 0"),
        ("plan P --prompts TWO --samples 0", "--samples: expected an integer from 1, got 0"),
        ("plan P --prompts TWO --every 0", "--every: expected an integer from 1, got 0"),
        ("plan P --prompts TWO --seed -1", "--seed: expected an integer from 0, got -1"),
        ("plan P --prompts none", "none"),
        ("compare none", "videos: expected a folder, got none"),
        ("compare .", "videos: expected a folder dense and another one in"),
        (
            "compare ARMS",
            "videos: expected mp4 files of the same names in ARMS/fast and ARMS/dense",
        ),
        ("table none", "videos: expected a folder, got none"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").write_text("\n")
    for arm in ("dense", "fast"):
        (tmp_path / "ARMS" / arm).mkdir(parents=True)
    (tmp_path / "TWO").write_text("a cat\na dog\n")
    try:
        status = vbench.main(arguments.split())
    except SystemExit as end:
        status = end.code
    assert status == 2 and not (tmp_path / "P").exists()
    assert words in capsys.readouterr().err.splitlines()[-1]
