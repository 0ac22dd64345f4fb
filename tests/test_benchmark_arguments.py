"""Wrong arguments of the benchmarks: a sentence and status 2 before anything is loaded or timed."""

import argparse
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import _arguments  # noqa: E402
import attention_share  # noqa: E402
import bench  # noqa: E402
import quality  # noqa: E402
import tuning  # noqa: E402


@pytest.mark.parametrize(
    ("program", "arguments", "words"),
    [
        (bench, "--rows (", "--rows: expected a regular expression, got ("),
        (bench, "--samples 0", "--samples: expected an integer from 1"),
        (bench, "--against none.json", "--against: expected a file, got none.json"),
        (bench, "--json .", "--json: expected a file in a folder that is there or can be made"),
        (bench, "--json bad.json/y.json", "--json: expected a file in a folder that is there"),
        (attention_share, "--device meta", "--device: expected cpu, or a GPU that torch sees"),
        (attention_share, "--device nowhere", "--device: expected cpu, or a GPU that torch sees"),
        (attention_share, "--size 9B", "--size: invalid choice: '9B'"),
        (attention_share, "--layers 0", "--layers: expected an integer from 1"),
        (attention_share, "--frames 4", "--frames: expected a multiple of 3 of at least 6, got 4"),
        (attention_share, "--height 3", "--height: expected an even number, got 3"),
        (attention_share, "--preset best", "--preset: invalid choice: 'best'"),
        (attention_share, "--saved none.json", "--saved: expected a file, got none.json"),
        (attention_share, "--saved bad.json", "--saved: expected --plot beside it, got none"),
        (attention_share, "--saved bad.json --plot a.png", "--saved: expected what --json wrote"),
        (quality, "--seconds -1", "--seconds: expected a number from 0.001"),
        (quality, "--judged -1", "--judged: expected an integer from 0"),
        (quality, "--seed -1", "--seed: expected an integer from 0"),
        (quality, "--device nowhere", "--device: expected cpu, or a GPU that torch sees"),
        (quality, "--results bad.json/x", "--results: expected a file in a folder"),
        (quality, "--out bad.json", "--out: expected a folder that is there or can be made, got"),
        (tuning, "--out bad.json", "--out: expected a folder that is there or can be made, got"),
        (quality, "--join none", "--join: expected a file, got none"),
        (tuning, "--seconds -1", "--seconds: expected a number from 0.001"),
        (tuning, "--steps 0", "--steps: expected an integer from 1"),
        (tuning, "--clips 0", "--clips: expected an integer from 1"),
        (tuning, "--batch 0", "--batch: expected an integer from 1"),
        (tuning, "--seed -1", "--seed: expected an integer from 0"),
        (tuning, "--device nowhere", "--device: expected cpu, or a GPU that torch sees"),
        (tuning, "--weights none", "--weights: folder: no world.safetensors in none"),
        (tuning, "--results bad.json/x", "--results: expected a file in a folder"),
    ],
)
def test_wrong_arguments_are_one_sentence(program, arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text("{")
    try:
        status = program.main(arguments.split())
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("read", "text", "value"),
    [
        (_arguments.count, "12", 12),
        (_arguments.duration, "0.5", 0.5),
        (_arguments.device, "cpu", "cpu"),
        (_arguments.pattern, "^a.c$", "^a.c$"),
        (_arguments.old_file, __file__, Path(__file__)),
        (_arguments.folder, str(BENCHMARKS), str(BENCHMARKS)),
    ],
)
def test_right_ones_pass(read, text, value):
    assert read(text) == value


def test_a_place_to_write_is_tried_and_not_made(tmp_path, monkeypatch):
    file = tmp_path / "a" / "b.json"
    assert _arguments.new_file(str(file)) == file
    assert _arguments.new_folder(str(file.parent)) == file.parent
    assert not list(tmp_path.iterdir())
    file.parent.mkdir()
    file.write_text("old")
    assert _arguments.new_file(str(file)) == file and file.read_text() == "old"
    assert list(tmp_path.rglob("*")) == [file.parent, file]
    with pytest.raises(argparse.ArgumentTypeError, match="expected a file in a folder"):
        _arguments.new_file(str(file.parent))
    for below in (file, file / "c"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a folder that is there"):
            _arguments.new_folder(str(below))

    def refused(*arguments, **options):
        raise PermissionError

    monkeypatch.setattr(_arguments.cli.tempfile, "TemporaryDirectory", refused)
    for read in (_arguments.new_file, _arguments.new_folder):
        with pytest.raises(argparse.ArgumentTypeError, match="there or can be made, got"):
            read(str(tmp_path / "none" / "y"))
