"""Config: the presets, one number, validation in sentences, JSON round trip."""

import dataclasses

import pytest

import lightforcing as lf
from lightforcing import Config


def test_defaults_are_the_balanced_preset_but_for_shares_of_steps():
    assert Config.preset() == Config.preset("balanced")
    assert Config() == Config.preset(step_share=None)
    assert len(Config.preset().step_share) == 5 and Config.preset("paper").step_share is None


@pytest.mark.parametrize(
    "name, sparsity, base, law, score, hierarchy, frames",
    [
        ("paper", 0.88, 0.98, "linear", "mean", True, (6, 1, 2)),
        ("paper-long", 0.85, 0.95, "linear", "mean", True, (3, 1, 1)),
        ("quality", 0.70, None, "count", "mass", False, (6, 1, 2)),
        ("balanced", 0.80, None, "count", "mass", False, (6, 1, 2)),
        ("fast", 0.88, None, "count", "mass", False, (6, 1, 2)),
    ],
)
def test_presets(name, sparsity, base, law, score, hierarchy, frames):
    c = Config.preset(name)
    assert (c.sparsity, c.base, c.law, c.score, c.hierarchy) == (
        sparsity, base, law, score, hierarchy,
    )  # fmt: skip
    assert (c.keep_frames, c.sink_frames, c.near_frames) == frames
    assert c.window == (12 if name == "paper-long" else None)


def test_one_number_sets_target_and_base_and_keeps_the_rest():
    c = Config.preset("paper", sparsity=0.5)
    assert (c.sparsity, c.base, c.law, c.score) == (0.5, None, "linear", "mean")
    assert Config.preset("paper", sparsity=0.5, base=0.9).base == 0.9
    from lightforcing import report

    solved = report.schedule(c, 3, None).sparsity
    assert solved.tolist() == lf.cag_schedule(21, 3, sparsity=0.5, base=0.6).tolist()


@pytest.mark.parametrize(
    "c",
    [
        Config(),
        Config.preset("paper-long", sparsity=0.5, dense_layers=[0, -1], dense_steps=(0,)),
        Config(schedule=[0, 0.5, 0.9], chunk_ends=[1, 4, 7], frame_tokens=880, probe=16),
    ],
)
def test_round_trips(c):
    assert Config.from_json(c.to_json()) == c
    assert Config.from_dict(c.to_dict()) == c
    assert hash(Config.from_json(c.to_json())) == hash(c)
    assert all(not isinstance(v, tuple) for v in c.to_dict().values())


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().sparsity = 0.5


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"sparsity": 1.0}, "sparsity: expected a number in [0, 1), got 1.0"),
        ({"sparsity": -0.1}, "sparsity: expected a number in [0, 1), got -0.1"),
        ({"sparsity": float("nan")}, "sparsity: expected a number in [0, 1), got nan"),
        ({"law": "linear", "base": 0.7}, "base: expected a number in [0.8, 1], got 0.7"),
        ({"law": "linear", "base": 1.5}, "base: expected a number in [0.8, 1], got 1.5"),
        ({"law": "count", "base": 0.9},
         "base: expected none with law count, which does not grow towards it (linear and "
         "exponential do), got 0.9"),
        ({"law": "constant", "base": 0.9},
         "base: expected none with law constant, which does not grow towards it (linear and "
         "exponential do), got 0.9"),
        ({"law": "cubic"},
         "law: expected one of linear, exponential, constant, count, got 'cubic'"),
        ({"score": "max"}, "score: expected one of mean, mass, lse, got 'max'"),
        ({"window": 0}, "window: expected an integer of at least 1, got 0"),
        ({"dense_frames": -1}, "dense_frames: expected an integer of at least 0, got -1"),
        ({"block_k": 48}, "block_k: expected one of 16, 32, 64, 128, got 48"),
        ({"block_q": 8}, "block_q: expected an integer of at least 16, got 8"),
        ({"block_q": 256}, "block_q: expected an integer of at most 128, got 256"),
        ({"dense_steps": [-1]}, "dense_steps: expected an integer of at least 0, got -1"),
        ({"chunk_ends": [3, 3]}, "chunk_ends: expected ascending frame numbers, got [3, 3]"),
        ({"grid": [4, 5], "frame_tokens": 21},
         "grid: expected rows x columns = frame_tokens = 21, got [4, 5]"),
        ({"chunk_ends": []}, "chunk_ends: expected ascending frame numbers, got []"),
        ({"schedule": []}, "schedule: expected at least one value, got none"),
        ({"schedule": [0.5, 1.0]}, "schedule: expected a number in [0, 1), got 1.0"),
        ({"schedule": [0, 0.5], "chunk_ends": [1, 4, 7]},
         "schedule: expected 3 values, one for each of chunk_ends, got 2"),
        ({"keep_frames": 2},
         "keep_frames: expected at least sink_frames + near_frames = 3, got 2"),
    ],
)  # fmt: skip
def test_values_out_of_range(settings, message):
    with pytest.raises(ValueError) as failure:
        Config(**settings)
    assert str(failure.value) == message


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"sparsity": "0.8"}, "sparsity: expected a number, got '0.8'"),
        ({"sparsity": True}, "sparsity: expected a number, got True"),
        ({"window": 1.5}, "window: expected an integer, got 1.5"),
        ({"frames_per_chunk": True}, "frames_per_chunk: expected an integer, got True"),
        ({"strict": 1}, "strict: expected True or False, got 1"),
        ({"dense_layers": 3}, "dense_layers: expected a list, got 3"),
        ({"dense_steps": "01"}, "dense_steps: expected a list, got '01'"),
    ],
)
def test_values_of_the_wrong_kind(settings, message):
    with pytest.raises(TypeError) as failure:
        Config(**settings)
    assert str(failure.value) == message


@pytest.mark.parametrize("beside", [{"score": "mean"}, {"hierarchy": True}])
def test_a_score_beside_a_selector_is_refused(beside):
    ((name, value),) = beside.items()
    with pytest.raises(TypeError) as failure:
        Config.preset("fast", selector="sta", **beside)
    expected = f"selector: expected no {name} beside it, which it takes the place of, got {value!r}"
    assert str(failure.value) == expected
    assert Config.preset("paper", selector="sta").score == "mean"  # the preset's own may stay


@pytest.mark.parametrize("law", ["constant", "count"])
def test_a_law_without_a_base_drops_the_presets_own_and_refuses_a_given_one(law):
    c = Config.preset("paper", law=law)
    assert (c.law, c.base) == (law, None) and Config.from_dict(c.to_dict()) == c
    assert Config.preset("paper").replace(law=law) == c
    for make in (lambda: Config.preset("paper", law=law, base=0.98), lambda: c.replace(base=0.98)):
        with pytest.raises(ValueError, match=f"base: expected none with law {law}"):
            make()


def test_unknown_names_list_the_known_ones():
    for make in (Config.preset, Config.from_dict, Config().replace):
        with pytest.raises(TypeError) as failure:
            make({"sparse": 1}) if make == Config.from_dict else make(sparse=1)
        assert str(failure.value).startswith("sparse: no such setting; the settings are sparsity, ")
        assert str(failure.value).endswith("strict, timing, probe")
    with pytest.raises(ValueError) as failure:
        Config.preset("turbo")
    assert str(failure.value) == (
        "preset: expected one of paper, paper-long, quality, balanced, fast, got 'turbo'"
    )


@pytest.mark.parametrize(
    "given, ending",
    [
        ("blanced", "got 'blanced'; did you mean 'balanced'?"),
        ("Fast", "got 'Fast'; did you mean 'fast'?"),
        ("paper_long", "got 'paper_long'; did you mean 'paper-long'?"),
        (0.8, "got 0.8; did you mean sparsity=0.8?"),
        ({"sparsity": 0.8}, "got a dict; settings are given as config="),
        (Config(), "got a Config; settings are given as config="),
        (None, "got None"),
    ],
)
def test_what_is_no_preset_is_told_what_to_write(given, ending):
    with pytest.raises(ValueError) as failure:
        lf.patch(object(), given)
    assert str(failure.value) == (
        f"preset: expected one of paper, paper-long, quality, balanced, fast, {ending}"
    )


def test_numpy_numbers_become_plain_ones():
    import numpy as np

    c = Config(sparsity=np.float32(0.5), window=np.int64(12), chunk_ends=np.array([3, 6]))
    assert (type(c.sparsity), type(c.window), c.chunk_ends) == (float, int, (3, 6))
    assert Config.from_json(c.to_json()) == c


@pytest.mark.parametrize(
    "share, error, sentence",
    [
        ((1, -1), ValueError, r"step_share: expected a number in \[0, 1e\+06\], got -1"),
        ((1, float("nan")), ValueError, "step_share: expected a number in .*got nan"),
        ((1, "a"), TypeError, "step_share: expected a number.*got 'a'"),
        ((0, 0), ValueError, r"step_share: expected numbers that are not all 0, got \[0.0, 0.0\]"),
        ("abc", TypeError, "step_share: expected a list, got 'abc'"),
        (b"abc", TypeError, "step_share: expected a list, got b'abc'"),
        ({1, 2}, TypeError, "step_share: expected a list, in order, got {1, 2}"),
        (3, TypeError, "step_share: expected a list, got 3"),
    ],
)
def test_step_share_is_judged(share, error, sentence):
    with pytest.raises(error, match=sentence):
        Config(step_share=share)


def test_step_share_stands_beside_no_refresh():
    with pytest.raises(ValueError, match="step_share: expected None beside refresh = 2"):
        Config(step_share=(1, 2), refresh=2)
