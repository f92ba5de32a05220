"""What all plots share: `ax`, `title`, `figsize` and `example`; what a user's style decides."""

import inspect
import pickle

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib import font_manager
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

import mechvlm as mv
from helpers.artists import note_of
from helpers.drawn import BY_EXAMPLE, MAKERS, N
from helpers.unchecked import unchecked
from mechvlm.figures.canvas import TrueTypeFigure

STYLES = {
    "default": {},
    "serif": {"font.family": "serif", "axes.titlelocation": "left", "axes.spines.top": True},
    "journal": {
        "font.size": 7,
        "axes.titlesize": 8,
        "axes.labelsize": 7,
        "xtick.labelsize": 6,
        "figure.figsize": (3.3, 2.4),
    },
}


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


# -- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKERS)
def test_every_plot_takes_the_same_arguments(kind):
    result = MAKERS[kind]()
    names = list(inspect.signature(result.plot).parameters)
    assert names[:4] == ["ax", "title", "figsize", "example"]
    assert "figsize: (width, height)" in result.plot.__doc__, "and help() explains them"
    own = result.plot().get_title()
    assert own
    ax = result.plot(title="A title of mine", figsize=(6.5, 4.5))
    assert ax.get_title() == "A title of mine"
    assert ax.figure.get_size_inches().tolist() == [6.5, 4.5]
    assert titles_of(ax.figure) == ["A title of mine", *others_of(kind)]
    bare = result.plot(title=False)
    assert (bare.get_title(), note_of(bare)) == ("", "")
    ax.set_title("Another")
    assert titles_of(ax.figure) == ["Another", *others_of(kind)], "no second title stays above the first"


def titles_of(figure: Figure) -> list[str]:
    return [title for ax in figure.axes for loc in ("left", "center", "right") if (title := ax.get_title(loc=loc))]


def others_of(kind: str) -> list[str]:
    """Titles of the panels beside the first."""
    names = ("lens precision", "lens recall", "cosine of image and caption", "last token's reading of the image")
    return list(names) if kind == "pairs" else []


def test_a_title_that_is_set_later_stands_above_the_note():
    ax = MAKERS["flow"]().plot()
    ax.set_title("Mine")
    ax.figure.draw_without_rendering()
    (top,) = ax.child_axes
    note, title = top.xaxis.label.get_window_extent(), ax.title.get_window_extent()
    assert ax.bbox.y1 < note.y0 < note.y1 < title.y0


@pytest.mark.parametrize("kind", BY_EXAMPLE)
def test_one_example_is_that_of_the_example_alone(kind):
    """The same artists as of a result that holds this example and no other."""
    make = BY_EXAMPLE[kind]
    many = make(N)
    ax = many.plot(example=2)
    assert "example 2" in note_of(ax)
    alone = many.single(2)
    assert alone.count_examples() == 1
    pd.testing.assert_frame_equal(rows_of(alone), rows_of(many, 2))
    assert drawn_numbers(ax) == drawn_numbers(alone.plot())
    if kind not in ("queries", "neurons", "words"):
        assert drawn_numbers(ax) != drawn_numbers(many.plot()), "and not that of all"
    with pytest.raises(IndexError, match=f"Example {N} was asked for; this result holds 0 to {N - 1}"):
        many.plot(example=N)


def rows_of(result, example: int | None = None) -> pd.DataFrame:
    """The table's rows of one example, or of all, without their example's number and name."""
    frame = result.to_frame()
    if example is not None:
        number = frame["example"] if "example" in frame else frame["pair"].factorize()[0]
        frame = frame[number == example]
    return frame.drop(columns=["example", "pair", "id"], errors="ignore").reset_index(drop=True)


def drawn_numbers(ax) -> str:
    """The numbers that lines, bars, bands and maps stand for, in their order."""
    numbers: list = [np.asarray(line.get_ydata()).tolist() for line in ax.lines]
    numbers += [patch.get_height() for patch in ax.patches if hasattr(patch, "get_height")]
    maps = [art.get_array() for art in (*ax.collections, *ax.images)]
    return str([*numbers, *[None if values is None else values.tolist() for values in maps]])


def test_phases_hold_no_single_example():
    with pytest.raises(mv.InputError, match=r"holds nothing of single examples. phases are those of all"):
        MAKERS["phases"]().plot(example=0)


def test_wrong_arguments_are_refused_and_open_no_figure():
    result, ax = MAKERS["shares"](), Figure().add_subplot()
    for error, message, arguments in (
        (ValueError, r"figsize=\(3, 3\) is for a new figure", {"ax": ax, "figsize": (3, 3)}),
        (TypeError, "ax is a matplotlib Axes, not ndarray", {"ax": plt.subplots(1, 2)[1]}),
        (TypeError, "a title is words, or False", {"title": True}),
        (TypeError, "unexpected keyword argument 'colour'", {"colour": "red"}),
        (ValueError, "There is no group 'sky'", {"by": "sky"}),
    ):
        plt.close("all")
        with pytest.raises(error, match=message), unchecked():
            result.plot(**arguments)
        assert plt.get_fignums() == []


# -- given axes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKERS)
def test_neighbours_are_left_alone(kind):
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
    for ax in (left, right):
        ax.plot([1, 2], [3, 4])
        ax.set_title("mine")
    before = [state_of(ax) for ax in (left, right)]
    spec = [ax.get_subplotspec() for ax in (left, right)]
    assert MAKERS[kind]().plot(middle) is middle
    assert [state_of(ax) for ax in (left, right)] == before
    assert [ax.get_subplotspec() for ax in (left, right)] == spec
    assert plt.get_fignums() == [figure.number]


def state_of(ax) -> tuple:
    return (
        ax.get_title(), ax.get_xlim(), ax.get_ylim(), ax.get_xticks().tolist(), len(ax.get_children()), ax.get_xlabel(),
        type(ax.title), ax.spines["top"].get_visible(), ax.xaxis.get_gridlines()[0].get_visible(),
    )  # fmt: skip


# -- the user's style ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STYLES)
def test_the_users_own_style_is_kept(name):
    with plt.rc_context(STYLES[name]):
        before = dict(mpl.rcParams)
        ax = MAKERS["contextualization"]().plot()
        assert {key: value for key, value in mpl.rcParams.items() if before[key] != value} == {}
        ax.figure.draw_without_rendering()
        texts = [ax.title if name != "serif" else ax._left_title, ax.xaxis.label, *ax.get_xticklabels()]
        texts += ax.get_legend().get_texts()
        assert {tuple(text.get_fontfamily()) for text in texts} == {tuple(mpl.rcParams["font.family"])}
        plain = plt.figure().add_subplot()
        plain.set_title("a")
        plain.set_xlabel("a")
        plain.plot([0, 1], label="a")
        plain.legend()
        assert ax.xaxis.label.get_fontsize() == plain.xaxis.label.get_fontsize()
        # Where the user chose no size of letters, titles and legends are a size smaller.
        own, sizes = "font.size" in STYLES[name], {"title": plain.title, "label": plain.xaxis.label}
        assert texts[0].get_fontsize() == sizes["title" if own else "label"].get_fontsize()
        assert ax.get_xticklabels()[0].get_fontsize() == plain.get_xticklabels()[0].get_fontsize()
        assert ax.get_legend().get_texts()[0].get_fontsize() == pytest.approx(
            plain.get_legend().get_texts()[0].get_fontsize() * (1 if own else font_manager.font_scalings["small"])
        )
        assert texts[0].get_text().startswith("Contextualization")


def test_a_users_own_colors_are_taken_in_their_order():
    with plt.rc_context({"axes.prop_cycle": mpl.cycler(color=["#111111", "#777777", "#bbbbbb"])}):
        ax = MAKERS["contextualization"]().plot()
    assert [to_hex(line.get_color()) for line in ax.lines] == ["#111111", "#777777", "#bbbbbb"]


def test_on_a_dark_background_all_ink_is_the_users():
    with plt.style.context("dark_background"):
        figure = mv.figures.grid([MAKERS[kind]() for kind in ("controls", "ablation", "attribution", "head_sets")])
        panels = [ax for ax in figure.axes if ax.child_axes]
        assert len(panels) == 4
        for ax in panels:
            words = [ax.title, ax.child_axes[0].xaxis.label, *ax.get_legend().get_texts(), *ax.texts]
            assert {to_hex(text.get_color()) for text in words} == {"#ffffff"}
            drawn = [line.get_color() for line in ax.lines] + [
                color for c in ax.collections for color in c.get_edgecolor()
            ]
            assert all(max(to_rgb(color)) > 0.5 for color in drawn), "no dark line on black"
            assert not ax.xaxis.get_gridlines()[0].get_visible(), "a style without a grid gets none"


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [True, False])
def test_letters_in_saved_files_are_letters(tmp_path, given):
    result = MAKERS["contextualization"]()
    ax = result.plot(plt.figure().add_subplot()) if given else result.plot()
    ax.figure.savefig(tmp_path / "x.pdf")
    ax.figure.savefig(tmp_path / "x.svg")
    pdf = (tmp_path / "x.pdf").read_bytes()
    assert b"/FontFile2" in pdf, "TrueType"
    assert b"/Type3" not in pdf
    assert "mean cosine</text>" in (tmp_path / "x.svg").read_text()
    assert mpl.rcParams["pdf.fonttype"] == mpl.rcParamsDefault["pdf.fonttype"]
    assert isinstance(pickle.loads(pickle.dumps(ax.figure)), TrueTypeFigure)
