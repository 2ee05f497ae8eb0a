"""docs/encodings.md against the code: every name has its section, and each says what is so."""

import collections
import dataclasses
import inspect
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks.pictures import PICTURES, draw, effects
from benchmarks.pictures.__main__ import main
from nope_jax import attention, encodings
from nope_jax.encodings import (
    ENCODINGS,
    FIRE,
    FLOATER,
    KERPLE,
    SCHEDULES,
    T5,
    TUPE,
    ALiBi,
    ComplexOrder,
    Convolution,
    CoPE,
    DeBERTa,
    Encoding,
    HeadScale,
    Hierarchical,
    Learned,
    ModelDims,
    Multiplicative,
    RotaryScaling,
    Shaw,
    SSMax,
    Wrapper,
    resolve,
)

DOCS = Path(__file__).parents[2] / "docs"
FIELDS = ["Place", "Parameters", "Cost", "Past L", "Name", "Source"]
SCALINGS = [
    name
    for name, value in inspect.getmembers(encodings, inspect.isclass)
    if issubclass(value, RotaryScaling) and value is not RotaryScaling
]
UNNAMED = {"Base conversion": "base_conversion", "DroPE": "drope"}
"""Sections of what no name stands for, and their pictures."""


@dataclasses.dataclass(frozen=True)
class Section:
    title: str
    text: str

    @property
    def fields(self) -> dict[str, str]:
        """What stands after each **field**, its lines joined."""
        items = re.findall(r"^- \*\*(.+?)\*\*: (.+(?:\n  .+)*)", self.text, re.MULTILINE)
        return {field: " ".join(text.split()) for field, text in items}

    @property
    def code(self) -> list[str]:
        """What is to be typed."""
        return re.findall(r"`([^`]+)`", self.fields["Name"])

    @property
    def name(self) -> str | None:
        found = re.match(r"`--model\.encoding (\w+)|`RoPE\(.*scaling=(\w+)\(", self.fields["Name"])
        return found and (found[1] or found[2])


def sections_of(page: str) -> list[Section]:
    parts = re.split(r"^##(?=#? )", page, flags=re.MULTILINE)[1:]
    return [Section(*map(str.strip, part[1:].split("\n", 1))) for part in parts if part.startswith("#")]


PAGE = (DOCS / "encodings.md").read_text(encoding="utf-8")
SECTIONS = sections_of(PAGE)
every_section = pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.title)


def test_every_name_has_exactly_one_section():
    named = collections.Counter(section.name for section in SECTIONS if section.title not in UNNAMED)
    assert named == collections.Counter([*ENCODINGS, *SCHEDULES, *SCALINGS])
    assert len({section.title for section in SECTIONS} & set(UNNAMED)) == len(UNNAMED)


@every_section
def test_all_sections_have_one_layout(section):
    assert list(section.fields) == FIELDS
    image, idea, formula = section.text.split("\n\n")[:3]
    assert image.startswith("<img ") and idea.count(". ") <= 3 and formula


@every_section
def test_the_picture_is_there(section):
    (source, alt) = re.search(r'<img align="right" width="360" src="(.+?)" alt="(.+?)">', section.text).groups()
    assert source == f"images/encodings/{UNNAMED.get(section.title, section.name)}.png"
    assert len(alt) > 20
    data = (DOCS / source).read_bytes()
    assert data.startswith(b"\x89PNG") and b"IEND" in data[-12:]
    assert (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")) == (480, 270)
    assert len(data) < 32_000


@every_section
def test_the_source_can_be_followed(section):
    links = re.findall(r"\[(.+?)\]\((.+?)\)", section.fields["Source"])
    assert links and all(link.startswith("https://") for _, link in links)
    for text, link in links:
        number = re.fullmatch(r"arXiv (\d{4}\.\d{5})", text)
        assert ("arxiv.org" in link) == (link == f"https://arxiv.org/abs/{number and number[1]}")


@every_section
def test_what_is_to_be_typed_works(section):
    if section.title in UNNAMED:
        return
    functions = [code for code in section.code if code.endswith("_attention")]
    assert all(hasattr(attention, name) for name in functions)
    own = f"{'rope' if section.name in SCALINGS else section.name}_attention"
    assert functions == ([own] if hasattr(attention, own) else [])

    *specs, expression = [code for code in section.code if code not in functions]
    made = eval(expression, dict(vars(encodings)))
    made = made if isinstance(made, tuple) else (made,)
    if section.name in SCALINGS:
        assert type(made[0].scaling).__name__ == section.name
    else:
        (spec,) = specs
        assert resolve(spec.removeprefix("--model.encoding ")) == made


# --- Parameters

TWO_SIZES = ModelDims(6, 10, 22, 29, 3, 17), ModelDims(4, 14, 26, 37, 2, 19)

VARIANTS: dict[str, list[Encoding]] = {
    "learned": [Learned(length=11)],
    "hierarchical": [Hierarchical(length=11)],
    "multiplicative": [Multiplicative(length=11), Multiplicative(sinusoidal=True)],
    "complex": [ComplexOrder(per_token=False)],
    "floater": [FLOATER(width=5)],
    "convolution": [Convolution(kernel_size=3)],
    "alibi": [ALiBi(learned=True)],
    "t5": [T5(num_buckets=8)],
    "kerple": [KERPLE("power")],
    "fire": [FIRE(width=7)],
    "shaw": [Shaw(clip=5)],
    "tupe": [TUPE(relative=False), TUPE(length=11, num_buckets=8)],
    "deberta": [DeBERTa(max_distance=40, buckets=12), DeBERTa(absolute=True), DeBERTa(absolute=True, length=11)],
    "cope": [CoPE(num_positions=9)],
    "head_scale": [HeadScale(T5())],
    "ssmax": [SSMax(T5())],
}
"""Settings that change how much is learned."""


def counted(encoding: Encoding, dims: ModelDims) -> list[int]:
    """Parameters per model and per layer; a wrapper's own ones."""
    key = jax.random.key(0)
    shapes = [jax.eval_shape(lambda k, f=f: f(k, dims), key) for f in (encoding.init_shared, encoding.init_layer)]
    counts = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in shapes]
    if isinstance(encoding, Wrapper):
        counts = [own - inner for own, inner in zip(counts, counted(encoding.encoding, dims), strict=True)]
    return counts


def written(section: Section, encoding: Encoding, dims: ModelDims) -> list[int]:
    """The same, as the page has it."""
    letters = {
        "N": dims.num_heads,
        "K": dims.num_kv_heads,
        "H": dims.head_dim,
        "D": dims.model_dim,
        "V": dims.vocab_size,
        "L_train": dims.train_length,
    }
    settings = {field.name: getattr(encoding, field.name) for field in dataclasses.fields(encoding)}
    expressions = re.match(r"per model `(.+?)`, per layer `(.+?)`", section.fields["Parameters"]).groups()
    return [eval(expression, {"__builtins__": {}}, letters | settings) for expression in expressions]


def encodings_of(section: Section) -> tuple[Encoding, ...]:
    if section.name in ENCODINGS:
        return (ENCODINGS[section.name](), *VARIANTS.get(section.name, []))
    if section.name in SCHEDULES:
        return SCHEDULES[section.name]
    return (eval(section.code[0], dict(vars(encodings))),)


@pytest.mark.parametrize("section", [s for s in SECTIONS if s.title not in UNNAMED], ids=lambda s: s.title)
def test_the_parameters_are_as_many_as_written(section):
    for dims in TWO_SIZES:
        for encoding in encodings_of(section):
            assert written(section, encoding, dims) == counted(encoding, dims), encoding


def test_a_wrong_count_is_found():
    (section,) = (section for section in SECTIONS if section.name == "kerple")
    wrong = dataclasses.replace(section, text=section.text.replace("`2*N`", "`3*N`"))
    assert written(wrong, KERPLE(), TWO_SIZES[0]) != counted(KERPLE(), TWO_SIZES[0])


# --- The page as a whole


@pytest.mark.parametrize(("expression", "number"), re.findall(r"`([^`]+)` is\s+([\d,]*\d)", PAGE))
def test_stated_numbers(expression, number):
    assert eval(expression, dict(vars(encodings))) == int(number.replace(",", ""))


def test_the_index_and_all_other_links_within_lead_to_sections():
    def anchor(title):
        return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")

    anchors = [anchor(section.title) for section in SECTIONS]
    assert len(set(anchors)) == len(anchors)
    links = re.findall(r"\]\(#([^)]+)\)", PAGE)
    assert set(links) <= set(anchors)
    index = PAGE[: PAGE.index("\n## ")]
    assert sorted(re.findall(r"\]\(#([^)]+)\)", index)) == sorted(anchors)


@pytest.mark.parametrize(
    ("title", "correction"),
    [
        ("ALiBi", "after the scaling by 1/√d"),
        ("T5 bias", "16 exact buckets"),
        ("T5 bias", "tell past from future"),
        ("Position interpolation", "changes the base"),
        ("NTK-aware", "post"),
        ("Log-n", "multiplies the logit"),
        ("RoPE", "does not extrapolate"),
        ("NoPE", "not permutation-invariant"),
        ("NoPE", "107 M parameters"),
        ("Sinusoidal", '"APE" is sinusoidal'),
        ("SmolLM3", "Command R7B and Kimi Linear"),
    ],
)
def test_popular_errors_are_put_right_where_one_meets_them(title, correction):
    (section,) = (section for section in SECTIONS if section.title == title)
    told = " ".join(" ".join(re.findall(r"^> (.+)", section.text, re.MULTILINE)).split())
    assert correction in told.partition("**In fact**")[2]


# --- The pictures


def test_every_section_can_be_drawn_again_and_no_picture_is_left_over():
    names = {UNNAMED.get(section.title, section.name) for section in SECTIONS}
    assert set(PICTURES) == names
    assert {path.stem for path in (DOCS / "images/encodings").iterdir()} == names


def test_a_picture_is_the_same_every_time(tmp_path):
    first = draw("log_n", tmp_path).read_bytes()
    assert draw("log_n", tmp_path).read_bytes() == first


def test_the_logits_that_are_drawn_are_those_of_attention():
    """Against the formulas, of two that are simple enough."""
    query, key = map(np.asarray, effects.alike(9, heads=4))
    content = query[0] @ key[0, 0] / 32**0.5
    distance = np.arange(9)[:, None] - np.arange(9)
    slopes = 2.0 ** (-2 * np.arange(1, 5))
    expected = content[:, None, None] - slopes[:, None, None] * distance
    got = effects.logits(ALiBi(), {}, query, key)
    np.testing.assert_allclose(got, np.where(distance >= 0, expected, np.nan), atol=1e-5)

    params = {name: np.random.default_rng(0).standard_normal((5, 32)).astype(np.float32) for name in ("keys", "values")}
    rows = params["keys"][[2, 1, 0]]  # of the distances 0, 1 and 2
    expected = np.asarray(effects.alike(9)[0])[0] @ rows.T / 32**0.5
    got = effects.by_distance(Shaw(clip=2), 9, params)
    np.testing.assert_allclose(got, expected[:, [0, 1, *[2] * 7]], atol=1e-5)


def test_an_unknown_picture_is_refused():
    with pytest.raises(SystemExit, match="no picture is called alibbi"):
        main(["alibbi"])


@pytest.mark.slow
def test_every_picture_can_be_drawn(tmp_path):
    for name in PICTURES:
        assert draw(name, tmp_path).stat().st_size > 1000
