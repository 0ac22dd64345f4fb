"""The demo, with a tiny untrained world model in place of the trained one."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lightforcing import demo, pictures
from lightforcing.world.model import new_model

OPTIONS = dict(view=32, frames=9, clip=3, seed=1, sparsity=0.6)


def model():
    """Weights whose attention matters: an untrained head and gates add nothing."""
    made = new_model("tiny", seed=4)
    draw = torch.Generator().manual_seed(0)
    for name, weight in made.named_parameters():
        if name.endswith(("self_attn.o.weight", "ffn.2.weight", "head.head.weight")):
            weight.data.normal_(0.0, weight.shape[1] ** -0.5, generator=draw)
    return made


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    result = demo.run(SimpleNamespace(**OPTIONS, out=str(folder)), model())
    return folder, result


def test_the_files(shown):
    folder, result = shown
    names = ["contact-sheet.png", "report.json", "video.gif", "video.mp4"]
    assert sorted(p.name for p in folder.iterdir()) == names
    assert json.loads((folder / "report.json").read_text()) == result
    with Image.open(folder / "video.gif") as film:
        assert film.n_frames == 9
        assert film.width >= 6 * 32 * demo.SCALE
    assert (folder / "video.mp4").read_bytes()[4:8] == b"ftyp"


def test_every_rule_keeps_the_same_share_and_is_measured(shown):
    rules = dict(shown[1]["rules"])
    assert list(rules) == ["dense", "fast", "paper", "window", "random"]
    dense = rules.pop("dense")
    assert dense["density"] == 1 and dense["recall"] is None
    for rule in rules.values():
        assert 0.3 < rule["density"] < 0.5
        assert rule["density"] < rule["recall"] + 0.1 < 1.1 and rule["attention_seconds"] > 0
    assert rules["paper"]["density"] == rules["window"]["density"] == rules["random"]["density"]
    assert rules["window"]["config"]["selector"] == {"name": "sta", **_rest(rules["window"])}
    assert rules["fast"]["config"]["score"] == "mass"
    assert len({rule["psnr"]["all"] for rule in rules.values()}) == 4


def _rest(rule):
    return {k: v for k, v in rule["config"]["selector"].items() if k != "name"}


def test_the_same_again(shown, tmp_path):
    again = demo.run(SimpleNamespace(**OPTIONS, out=str(tmp_path)), model())
    for name, rule in again["rules"].items():
        assert rule["psnr"] == shown[1]["rules"][name]["psnr"]
    other = demo.run(SimpleNamespace(**OPTIONS | {"seed": 2}, out=str(tmp_path)), model())
    assert other["rules"]["dense"]["psnr"] != again["rules"]["dense"]["psnr"]


def test_the_summary_has_a_line_a_rule(shown):
    lines = demo.summary(shown[1]).splitlines()
    for rule, values in shown[1]["rules"].items():
        line = next(x for x in lines if x.startswith(rule + " "))
        assert f"{values['psnr']['all']:.2f}" in line
    assert "report.json" in lines[-1]


def test_side_by_side_gives_room_to_the_notes():
    video = np.zeros((2, 8, 8, 3), np.uint8)
    plain = pictures.side_by_side({"a": video}, ["x", "y"], 2)
    noted = pictures.side_by_side({"a": video}, ["x", "y"], 2, {"a": ["one", "two"]})
    assert len(noted) == 2 and noted[0].shape[0] > plain[0].shape[0]
    assert noted[0].shape[0] % 16 == noted[0].shape[1] % 16 == 0
