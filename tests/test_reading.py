"""What readers are promised of every notebook: figures in one style, described in words; the time it takes, a title and limits; nothing oversized."""
import re

import nbformat
import pytest

from docs.stage import directives
from tests.notebooks import ROOT, notebooks

PICTURES = ("image/png", "image/jpeg", "image/svg+xml")
every = pytest.mark.parametrize("path", [*notebooks(), ROOT / "nbs" / "strategies" / "_template.ipynb"], ids=lambda p: p.stem if p.stem != "index" else f"{p.parent.name}-index")


def cells(path):
    return nbformat.read(path, as_version=4).cells


def figures(found):
    "The cells that show a picture: sources."
    return [c.source for c in found if c.cell_type == "code" and any(kind in o.get("data", {}) for o in c.outputs for kind in PICTURES)]


def undescribed(sources):
    "The cells without a text of their own, long enough to say something, that goes beyond naming a figure."
    texts = {source: directives(source)[0].get("fig-alt", "").strip("\"' ") for source in sources}
    return [source[:80] for source, text in texts.items() if len(text.split()) < 6 or re.match(r"(?i)(a |the )?(figure|plot|image) of", text)]


@every
def test_every_figure_is_described_in_words(path):
    assert not undescribed(figures(cells(path)))


@every
def test_figures_share_one_style(path):
    found = cells(path)
    if figures(found):
        assert any('plt.style.use("irnb.irnb")' in c.source for c in found if c.cell_type == "code")


@every
def test_its_top_says_what_it_is_and_how_long_it_takes(path):
    top = "\n".join(c.source for c in cells(path)[:3] if c.cell_type == "markdown")
    assert re.match(r"# \S", top) and (path.parent.name + path.stem == "nbsindex" or re.search(r"(?is)\b(runs?|takes?)\b[^.]{0,60}\b(s|seconds?|minutes?)\b", top))


def titles_of(*paths):
    return [m for path in paths for c in cells(path) if c.cell_type == "markdown" for m in re.findall(r"(?m)^#+ (.+)$", c.source)]


@every
def test_limits_and_a_use_in_ones_own_code_are_told(path):
    "By every notebook; a room of several tells its use on its page, which is called index, and its limits where they arise."
    room = path.parent.parent.name == "bench"
    if path.stem != "index" or room:
        use, limits = (titles_of(path.parent / "index.ipynb"), titles_of(*path.parent.glob("*.ipynb"))) if room else (titles_of(path), titles_of(path))
        assert any(re.search("(?i)limits", t) for t in limits) and any(re.search("(?i)your own|use it|in a script|in ten lines", t) for t in use), use


@every
def test_it_is_small_enough_to_load_at_once(path):
    assert path.stat().st_size < 1.2e6


def test_a_figure_without_words_is_found():
    bare, said = "plot()", "#| fig-alt: Two curves that cross where the noise is strongest.\nplot()"
    assert undescribed([bare, said, "#| fig-alt: A figure of the error of two methods.\nplot()", "#| fig-alt: Curves.\nplot()"]) == \
        [bare, "#| fig-alt: A figure of the error of two methods.\nplot()", "#| fig-alt: Curves.\nplot()"]
