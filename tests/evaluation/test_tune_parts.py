"""What tuning is made of, without a run: searches, new encodings, pictures and reports."""

import dataclasses
import math

import numpy as np
import pytest

from nope_jax import cli
from nope_jax.config import Config
from nope_jax.encodings import (
    ALiBi,
    DynamicNTKScaling,
    HeadScale,
    LinearScaling,
    LogN,
    NoPE,
    NTKScaling,
    RoPE,
    SSMax,
    Windowed,
    YaRNScaling,
)
from nope_jax.encodings.rotary import rope_frequencies
from nope_jax.evaluation.common.placement import place
from nope_jax.evaluation.common.plots import save
from nope_jax.evaluation.common.report import Section, add_sections
from nope_jax.evaluation.tune import report
from nope_jax.evaluation.tune.methods import new_encoding, with_encoding
from nope_jax.evaluation.tune.search import best_factor, golden_section
from nope_jax.evaluation.tune.state import Learned, Outcome, Tuning
from tests.evaluation.test_tune import HEADS, LONG, MODEL, ROPE, SHORT, TRAINED
from tests.support.drawn_model import drawn_model


@pytest.mark.parametrize("least", [0.81, 1.0, 1.3737, 1.99])
@pytest.mark.parametrize("function", [lambda x: x * x, lambda x: abs(x) ** 1.2, lambda x: math.exp(3 * x) - 3 * x])
def test_golden_section_finds_the_least(function, least):
    tried = []

    def shifted(x):
        tried.append(x)
        return function(x - least)

    assert abs(golden_section(shifted, 0.8, 2.0, 0.01) - least) <= 0.01
    assert min(tried) > 0.8 and max(tried) < 2.0 and len(tried) <= 2 + math.ceil(math.log(0.01 / 1.2, 0.618))


@pytest.mark.parametrize("least", [0.4321, 0.9, 1.0, 1.2, 1.5678, 2.4, 3.3])
def test_best_factor_is_found_inside_and_outside_of_the_grid(least):
    factor, loss = best_factor(lambda factor: math.log(factor / least) ** 2)
    assert abs(factor - least) <= 0.01 and loss == math.log(factor / least) ** 2


def test_best_factor_passes_over_what_is_not_finite():
    assert abs(best_factor(lambda factor: math.nan if factor < 1.1 else (factor - 1.3) ** 2)[0] - 1.3) <= 0.01
    assert best_factor(lambda factor: 2.5) == (1.0, 2.5)  # nothing gained, nothing changed
    assert best_factor(lambda factor: -factor)[0] >= 4.0
    with pytest.raises(FloatingPointError, match="not finite, whatever the factor"):
        best_factor(lambda factor: math.nan)


def test_a_factor_that_was_tried_is_not_tried_again():
    seen, again = {}, {}
    found = best_factor(lambda factor: (factor - 1.3) ** 2, seen)
    again.update((factor, loss) for factor, loss in seen.items() if factor != 1.4)
    asked = []
    assert best_factor(lambda factor: asked.append(factor) or (factor - 1.3) ** 2, again) == found
    assert asked == [1.4] and again == seen


@pytest.mark.parametrize("least", [-1.0, 0.9, 3.9, 5.0])
def test_a_best_factor_at_the_edge_of_what_was_tried_is_remarked_on(least):
    outcome = Outcome(LONG, 3)
    outcome.factor, outcome.loss_at_factor = best_factor(lambda factor: abs(factor - least), outcome.tried)
    made = Tuning("uniform", "runs/nope", "python_stdlib", TRAINED, {}, "", [outcome], "", 0, factor=outcome.factor)
    remarks = [note for note in report.notes(made) if "edge" in note]
    # The grid is 0.2 to 4.0, and its ends are searched to 0.2 on either side.
    assert len(remarks) == (least in (-1.0, 5.0))
    for remark in remarks:
        tried = f"{min(outcome.tried):.2f} to {max(outcome.tried):.2f}"
        assert f"At {LONG} tokens the best factor, {outcome.factor:.2f}, is at the edge" in remark and tried in remark


def test_the_fit_is_that_of_the_paper():
    # Their best factors at 2, 4 and 8 times the training length are about 1.2, 1.5 and 1.8 (arXiv 2404.12224).
    assert [round(report.wang_fit(stretch), 1) for stretch in (1, 2, 4, 8)] == [1.0, 1.3, 1.6, 1.8]


SCALINGS = {
    "linear": LinearScaling(LONG / TRAINED),
    "ntk": NTKScaling(LONG / TRAINED),
    "dynamic": DynamicNTKScaling(1.0, TRAINED),
    "yarn": YaRNScaling(LONG / TRAINED, TRAINED),
}


@pytest.mark.parametrize("method", SCALINGS)
def test_scalings_are_put_on_rope_wherever_it_is(method):
    def changed(encoding):
        model = dataclasses.replace(MODEL, num_layers=3, encoding=encoding)
        return new_encoding(Config(model), method, (SHORT, LONG))

    scaling = SCALINGS[method]
    assert changed(ROPE) == (NoPE(), HeadScale(Windowed(RoPE(base=500.0, scaling=scaling), 9)))
    assert changed("rope") == changed(("rope",)) == RoPE(scaling=scaling)
    assert changed(("rope", "alibi", "log_n:rope")) == (
        RoPE(scaling=scaling),
        ALiBi(),
        LogN(RoPE(scaling=scaling)),
    )


def test_learned_factors_go_to_the_layers_of_a_schedule_in_turn():
    config = dataclasses.replace(MODEL, num_layers=4, encoding=("nope", "alibi"))
    encoding = new_encoding(Config(config), "head", (SHORT, LONG))
    assert encoding == (HeadScale(NoPE()), HeadScale(ALiBi()))
    factors = np.arange(1.0, 9.0).reshape(4, 2)
    mesh = place([config], 1).mesh
    model = with_encoding(config, encoding, drawn_model(config), mesh, {"head_scale": factors})
    for slot, block in enumerate(model.blocks):
        np.testing.assert_array_equal(block.attention.position["head_scale"][...], factors[slot::2])


def test_ssmax_starts_from_one_over_the_logarithm_of_the_training_length():
    start = 1 / math.log(TRAINED)
    assert new_encoding(Config(MODEL), "ssmax", (SHORT, LONG)) == SSMax(ALiBi(), start)


def test_dynamic_scaling_is_ntk_by_the_length_over_the_training_length():
    scaling = new_encoding(Config(dataclasses.replace(MODEL, encoding="rope")), "dynamic", (SHORT, 99)).scaling
    for length in (TRAINED // 2, TRAINED, SHORT, LONG, 99):
        base = 10_000 * max(1, length / TRAINED) ** (8 / 6)
        expected = base ** (-np.arange(4) / 4)
        np.testing.assert_allclose(rope_frequencies(8, scaling=scaling, length=length), expected, rtol=1e-5)


def drawn(path, tuning, updates=()):
    """The axes of the picture of a tuning, which is also written."""
    figure = report.draw(tuning, updates)
    save(path, figure)
    assert path.read_bytes().startswith(b"\x89PNG")
    return figure.axes


def lines_of(axes):
    """The lines that have a name, and those that have none."""
    lines = {line.get_label(): np.transpose(line.get_data()).tolist() for line in axes.get_lines()}
    return {name: line for name, line in lines.items() if not name.startswith("_")}, [
        np.transpose(line.get_data()).tolist() for line in axes.get_lines() if line.get_label().startswith("_")
    ]


def made(method, outcomes, **values):
    return Tuning(method, "runs/nope", "python_stdlib", TRAINED, {"steps": 4}, "", outcomes, "", 0, **values)


def test_the_picture_of_uniform_factors(tmp_path):
    outcomes = []
    for length, factor in {SHORT: 1.2, LONG: 1.6}.items():
        tried = {1.0: 3.0, factor: 2.5, 0.8: math.inf, 2.0: 2.75}
        outcomes.append(Outcome(length, 3, 3.0, tried, factor, 2.5))
    left, right = drawn(tmp_path / "tune.png", made("uniform", outcomes))
    named, best = lines_of(left)
    assert named == {
        f"{SHORT} tokens": [[1.0, 3.0], [1.2, 2.5], [2.0, 2.75]],
        f"{LONG} tokens": [[1.0, 3.0], [1.6, 2.5], [2.0, 2.75]],
    }
    assert best == [[[1.2, 2.5]], [[1.6, 2.5]]]
    named, _ = lines_of(right)
    assert named["best"] == [[2.0, 1.2], [4.0, 1.6]]
    (fit,) = [np.array(line) for name, line in named.items() if name.startswith("Wang")]
    assert fit[0, 0] == 1 and fit[-1, 0] == pytest.approx(4)
    np.testing.assert_allclose(fit[:, 1], 1 + 0.397 * np.log(fit[:, 0]))


def test_the_picture_of_learned_factors(tmp_path):
    learned = Learned(4, HEADS.tolist(), None)
    updates = [{"step": step, "length": (SHORT, LONG)[step % 2], "loss": 3 - step / 4} for step in (1, 2, 3, 4)]
    outcomes = [Outcome(length, 3, 3.0) for length in (SHORT, LONG)]
    left, right, *_ = drawn(tmp_path / "tune.png", made("head", outcomes, learned=learned), updates)
    np.testing.assert_array_equal(left.get_images()[0].get_array(), HEADS.astype(np.float64))
    assert lines_of(right)[0] == {f"{SHORT} tokens": [[2, 2.5], [4, 2.0]], f"{LONG} tokens": [[1, 2.75], [3, 2.25]]}


def test_the_picture_of_a_scaling(tmp_path):
    outcomes = [Outcome(SHORT, 3, 3.0, loss_after=2.5), Outcome(LONG, 3, 4.0)]
    (axes,) = drawn(tmp_path / "tune.png", made("yarn", outcomes))
    assert lines_of(axes)[0] == {"before": [[SHORT, 3.0], [LONG, 4.0]], "after": [[SHORT, 2.5]]}


def test_a_report_takes_in_how_its_runs_were_tuned(tmp_path):
    out = tmp_path / "report"
    for name in "a/head", "b/head", "c":
        (tmp_path / name).mkdir(parents=True)
        if name != "c":  # was not tuned
            add_sections(tmp_path / name, "tune", [Section(f"of {name}")], "", [])
    workdirs = [tmp_path / name for name in ("a/head", "b/head", "c")]
    for _ in range(2):  # the second time changes nothing
        add_sections(out, "curves", [Section("Curves")], "", workdirs)
        page = (out / "report.html").read_text()
        assert [page.count(f"<h2>{name}</h2>") for name in ("Curves", "of a/head", "of b/head")] == [1, 1, 1]
        assert page.index("Curves") < page.index("of a/head")
    add_sections(tmp_path / "a/head", "curves", [Section("Curves")], "", workdirs[:1])
    page = (tmp_path / "a/head/report.html").read_text()
    assert page.count("<h2>of a/head</h2>") == 1 and "b/head" not in page


def test_the_ablation_of_wang_et_al_is_two_flags():
    words = ["--workdirs", "nope", "--method", "head", "--lengths", "24", "--out", "out"]
    both = cli.parse_eval(words, "tune").settings
    assert (both.focus, both.start) == (True, "uniform")
    neither = cli.parse_eval([*words, "--tune.focus", "False", "--tune.start", "one"], "tune").settings
    assert neither == dataclasses.replace(both, focus=False, start="one")
