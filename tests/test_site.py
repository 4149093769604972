"""The site: made offline without a warning, every link and anchor there, nothing foreign loaded, readable in a real browser at two widths."""
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import nbformat
import pytest

pytest.importorskip("myst_nb")
from docs import api, stage  # noqa: E402
from tests.browser import DESKTOP, PHONE, browser, serve  # noqa: E402
from tests.notebooks import ROOT, notebooks  # noqa: E402

slow = pytest.mark.slow


class Page(HTMLParser):
    "What the checks need to know of one page."

    def __init__(self, text: str):
        super().__init__()
        self.lang, self.ids, self.links, self.loads, self.headings, self.pictures = "", set(), [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        self.ids |= {a[k] for k in ("id", "name") if a.get(k)}
        if tag == "html":
            self.lang = a.get("lang")
        if tag == "a" and a.get("href"):
            self.links.append(a["href"])
        if tag == "img":
            self.pictures.append((a.get("src"), a.get("alt")))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag in ("script", "img", "iframe", "source") and a.get("src"):
            self.loads.append(a["src"])
        if tag == "link" and a.get("href") and a.get("rel") not in ("canonical", "index", "search", "next", "prev", "author", "copyright"):
            self.loads.append(a["href"])


def dead_ends(folder: Path, pages: dict[str, Page]) -> list[str]:
    "Links to a file or an anchor of the site that is not there, and what is loaded from elsewhere."
    found = []
    for name, page in pages.items():
        for target in page.links + page.loads:
            parts = urlsplit(urljoin(f"http://this-site/{name}", target))
            if parts.netloc == "this-site":
                other = unquote(parts.path).lstrip("/")
                if not (folder / other).is_file():
                    found.append(f"{name}: {target}")
                elif parts.fragment and other in pages and unquote(parts.fragment) not in pages[other].ids:
                    found.append(f"{name}: no anchor {target}")
            elif target in page.loads and parts.scheme != "data":
                found.append(f"{name}: loads {target}")
    return found


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The folder of the pages, made once."
    out = tmp_path_factory.mktemp("site")
    run = subprocess.run([sys.executable, "-m", "docs", str(out)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "WARNING" not in run.stderr, run.stderr[-4000:]
    return out / "html"


@pytest.fixture(scope="session")
def pages(site):
    return {p.relative_to(site).as_posix(): Page(p.read_text(encoding="utf-8")) for p in site.rglob("*.html") if "_static" not in p.parts}


@slow
def test_every_notebook_and_module_has_its_page(site, pages):
    assert {stage.staged(p).with_suffix(".html").as_posix() for p in notebooks()} <= set(pages)
    assert {f"api/{m.name}.html" for m in api.modules(ROOT)} <= set(pages)
    anchors = set().union(*(pages[f"api/{m.name}.html"].ids for m in api.modules(ROOT)))
    for module in api.modules(ROOT):   # what a package offers on demand stands on the page of the module behind it
        missing = [n for n in module.public if f"{module.name}.{n}" not in pages[f"api/{module.name}.html"].ids
                   and not any(re.fullmatch(rf"{re.escape(module.name)}\.\w+\.{n}", a) for a in anchors)]
        assert not missing, (module.name, missing)


@slow
def test_links_and_anchors_resolve_and_nothing_is_loaded_from_elsewhere(site, pages):
    assert sum(len(p.links) for p in pages.values()) > 1000
    assert dead_ends(site, pages) == []
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(\s*['\"]?(https?:)?//|@import", sheet.read_text(encoding="utf-8")), sheet


@slow
def test_pages_say_their_language_their_headings_are_in_order_and_figures_have_a_text(pages):
    for name, page in pages.items():
        assert page.lang == "en", name
        assert not [src for src, alt in page.pictures if not (alt or "").strip()], name
        if not name.startswith(("genindex", "search", "py-modindex")):
            steps = [b for a, b in zip(page.headings, page.headings[1:]) if b > a + 1]
            assert page.headings[0] == 1 and page.headings.count(1) == 1 and not steps, (name, page.headings)


@slow
def test_names_in_prose_lead_to_the_reference_and_the_reference_to_the_notebook(pages):
    assert "../api/irnb.strategies.strategy.html#irnb.strategies.strategy.contract" in pages["strategies/index.html"].links
    back = [t for t in pages["api/irnb.strategies.dil.html"].links if t.startswith("../strategies/21_dil.html#cell-")]
    assert len(back) > 10


def settled(b) -> bool:
    "Loaded, and all formulas typeset."
    if not b.js("document.readyState === 'complete'"):
        return False
    b.driver.execute_script("if (window.MathJax && MathJax.startup) MathJax.startup.promise.then(() => { window.irnbSettled = true })")
    return b.js("!document.querySelector('.math') || window.irnbSettled === true")


@slow
def test_pages_in_a_browser(site, tmp_path):
    "Formulas, width, console and what is loaded, on a desktop and on a phone; the pictures stay in the temporary folder to be looked at."
    names = {"index": 0, "strategies/22_noise_da": 20, "strategies/21_dil": 20, "bench/images": 0, "api/irnb.strategies.strategy": 0}
    with serve(site) as address, browser() as b:
        for size in (DESKTOP, PHONE):
            b.resize(size)
            for name, formulas in names.items():
                b.get(f"{address}/{name}.html")
                b.wait(settled)
                b.screenshot(tmp_path / f"{name.replace('/', '_')}-{size[0]}.png")
                assert b.js("document.querySelectorAll('mjx-container').length") >= formulas, name
                assert not b.find("mjx-merror"), [e.text for e in b.find("mjx-merror")]
                assert b.js("document.documentElement.scrollWidth") <= size[0], f"{name} is wider than {size[0]} px"
                assert b.js("[...document.images].every(i => i.complete && i.naturalWidth > 0)"), name
                loaded = b.js("performance.getEntriesByType('resource').map(e => e.name)")
                assert loaded and all(url.startswith((address, "data:")) for url in loaded), loaded
        assert b.errors() == []


@slow
def test_search_finds_without_a_network(site, tmp_path):
    with serve(site) as address, browser() as b:
        for start in (address, site.as_uri()):  # from the disk too: not even a server (but no excerpts: browsers fetch nothing there)
            for word, page in (("koschmieder", "irnb.degradations.weather"), ("counterfactual", "21_dil")):
                b.get(f"{start}/search.html?q={word}")
                hits = b.wait("#search-results .search a")
                assert any(page in (h.get_attribute("href") or "") for h in hits), [h.get_attribute("href") for h in hits]
            b.screenshot(tmp_path / f"search-{start[:4]}.png")
            if start == address:
                b.get(f"{start}/search.html?q=confounder")  # an excerpt of a page full of formulas
                b.wait("#search-results .search .context")
                shown = b.js("[...document.querySelectorAll('#search-results .context')].map(e => e.textContent).join(' ')")
                assert shown and "\\" not in shown, shown
                assert b.errors() == []


# ---- the parts, without a build

@pytest.fixture(scope="module")
def names():
    return stage.Names(api.modules(ROOT))


def test_dead_ends_are_found(tmp_path):
    (tmp_path / "a.html").write_text('<h1 id="here">x</h1><a href="#here">.</a><a href="#gone">.</a><a href="b.html">.</a><a href="https://x.org">.</a>'
                                     '<script src="https://cdn.x.org/y.js"></script>')
    found = dead_ends(tmp_path, {"a.html": Page((tmp_path / "a.html").read_text())})
    assert found == ["a.html: no anchor #gone", "a.html: b.html", "a.html: loads https://cdn.x.org/y.js"]


@pytest.mark.parametrize("text, full", [
    ("DIL", "irnb.strategies.dil.DIL"), ("irnb.strategies.DIL", "irnb.strategies.dil.DIL"), ("irnb.images", "irnb.images"),
    ("read_picture(path)", "irnb.image_files.read_picture"), ("Strategy.after_step", "irnb.strategies.strategy.Strategy.after_step"),
    ("psnr(x, y)", "irnb.metrics.psnr"), ("psnr", None), ("nothing_of_ours", None), ("x + DIL", None), ("irnb.nowhere", None), ("gaussian_noise", None)])
def test_names_are_found(names, text, full):
    assert names.find(text) == full


def test_a_name_of_two_modules_is_that_of_the_page_and_an_everyday_word_counts_at_home(names):
    assert names.find("gaussian_noise", "irnb.strategies.dil") == "irnb.strategies.dil.gaussian_noise"
    assert names.find("psnr", "irnb.metrics") == "irnb.metrics.psnr"


def test_only_prose_is_linked(names):
    text = "# `DIL`\nUse `DIL`, not [`DIL`](x.md) or $`DIL`$ or ``DIL``:\n\n```python\n`DIL`\n```\n"
    out = stage.outside_fences(text, lambda part: stage.linked(part, names))
    assert out == text.replace("Use `DIL`", "Use {py:obj}`DIL <irnb.strategies.dil.DIL>`")


def test_links_are_moved_and_missing_files_are_errors(tmp_path):
    page = ROOT / "nbs" / "strategies" / "20_strategy.ipynb"
    text = stage.relinked("[a](../30_training.ipynb#Limits) [b](../../LICENSE) [c](https://x.org) [d](#here)", page, tmp_path)
    assert text == f"[a](../30_training.ipynb#Limits) [b]({stage.repository()}/LICENSE) [c](https://x.org) [d](#here)"
    with pytest.raises(ValueError, match="20_strategy.ipynb links to 99_none.ipynb, which is not there"):
        stage.relinked("[a](99_none.ipynb)", page, tmp_path)


def test_directives_widgets_and_alternative_texts(tmp_path, names):
    new = nbformat.v4
    picture = new.new_output("display_data", data={"image/png": "iVBORw0KGgo="}, metadata={})
    widget = new.new_output("display_data", data={"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "interactive(...)"})
    cells = [new.new_markdown_cell("# Title\n\n> What it is about."), new.new_code_cell("#| default_exp x"), new.new_code_cell("#| hide\nsecret = 1"),
             new.new_markdown_cell("One thing. The curve falls with $x_1$:"), new.new_code_cell("#| export\nplot()", outputs=[picture]),
             new.new_code_cell("#| echo: false\n#| fig-alt: \"A falling curve.\"\nplot()", outputs=[picture, widget])]
    nb = new.new_notebook(cells=cells, metadata={"widgets": {"state": {}}})
    path, out = ROOT / "nbs" / "99_x.ipynb", tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage.nbformat, "read", lambda *a, **k: nb)
        stage.notebook(path, out, names)
    made = nbformat.from_dict(json.loads((out / "99_x.ipynb").read_text()))
    code = [c for c in made.cells if c.cell_type == "code"]
    assert ["".join(c.source) for c in code] == ["plot()", "plot()"] and "widgets" not in made.metadata
    assert [c.metadata.mystnb.image.alt for c in code] == ["Figure: The curve falls with x1:", "A falling curve."]
    assert [c.metadata.tags for c in code] == [[], ["remove-input"]]
    assert not any("widget" in kind for c in code for o in c.outputs for kind in o.get("data", {}))
    assert made.metadata.myst.html_meta.description == "What it is about."


def test_reference_reads_docments(tmp_path):
    source = '''"""About."""
# AUTOGENERATED! DO NOT EDIT! File to edit: ../nbs/x.ipynb.
__all__ = ["f", "C", "LIMIT", "A", "B"]
# %% ../nbs/x.ipynb #ab12
LIMIT = 3  # at most
A, B = 1, (2, 3)
# %% ../nbs/x.ipynb #cd34
def f(a: int,  # (B,) of `C`
      *, b: str = "x",  # $one | two$
      c: float = 1.0) -> bool:  # whether
    "Does *it*."
class C:
    "A thing."
    size: int = 2  # in pixels

    @property
    def area(self) -> int:
        "Squared."
'''
    (tmp_path / "irnb").mkdir()
    (tmp_path / "irnb" / "x.py").write_text(source)
    module, = api.modules(tmp_path)
    assert (module.name, module.cells["f"], module.cells["LIMIT"]) == ("irnb.x", "cd34", "ab12")
    assert api.known([module]) == {"irnb.x", "irnb.x.f", "irnb.x.C", "irnb.x.C.area", "irnb.x.LIMIT", "irnb.x.A", "irnb.x.B"}
    page = api.page(module, {"": "[x](../x.ipynb)", "f": "[here](#)"})
    for part in ("{py:function} f(a, *, b='x', c=1.0)", "| `a` | `int` | (B,) of `C` |", r"| `b` = `'x'` | `str` | \$one \| two\$ |", "| `c` = `1.0` | `float` |  |",
                 "| *returns* | `bool` | whether |", r"Does \*it\*.", "{py:class} C(size=2)", "| `size` = `2` | `int` | in pixels |", "{py:property} area\n:type: int",
                 "{py:data} LIMIT\n:value: 3", "{py:data} B\n:value: (2, 3)", "[here](#)"):
        assert part in page, part
