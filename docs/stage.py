"""The sources of the site: notebooks and Markdown of the repository, made ready for Sphinx in a folder of their own.

Directives (`#| hide`, `echo: false`, `fig-alt:` ...) become what MyST-NB knows, links to files become links between pages, public names in
backticks become links to the reference, and every figure gets a text for those who cannot see it.
"""
from __future__ import annotations

import configparser
import importlib.util
import os
import re
import shutil
from collections import defaultdict
from pathlib import Path

import nbformat

from docs import api

ROOT = Path(__file__).resolve().parent.parent
PARTS = {"Ground floor": "bench/*", "Degradations": "bench/degradations/*", "Data": "03*", "Networks": "networks/*", "Strategies": "strategies/*", "Training and evaluation": "3*", "Results": "bench/results/*", "Explorer": "bench/explorer/*"}
PAGES = {"CONTRIBUTING.md": "contributing.md", "docs/examples.md": "examples.md", "nbs/strategies/_template.ipynb": "template_strategy.ipynb",
         "examples/colab.ipynb": "colab.ipynb"}  # besides the notebooks of nbs/
PICTURES = (".png", ".jpg", ".jpeg", ".svg", ".gif", ".webp")
LINK, SPAN, MATHS = r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\([^)]*\)", r"(?<!`)`[^`\n]+`(?!`)", r"\$\$.*?\$\$|\$[^$\n]+\$"


def jupyter_slug(title: str) -> str:
    "The anchor of a heading, as JupyterLab makes it."
    return title.strip().replace(" ", "-")


def repository() -> str:
    "Address of the files of the repository."
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    return f"{settings['DEFAULT']['git_url']}/blob/{settings['DEFAULT']['branch']}"


def staged(path: Path) -> Path | None:
    "Where a file of the repository stands in the site; None for what is no page."
    relative = path.relative_to(ROOT).as_posix()
    if relative in PAGES:
        return Path(PAGES[relative])
    return Path(relative).relative_to("nbs") if relative.startswith("nbs/") and path.suffix == ".ipynb" else None


class Names:
    "Which public names there are, and what a backticked text in a page means."

    def __init__(self, modules: list[api.Module]):
        self.known, self.owners = api.known(modules), defaultdict(list)
        for module in modules:
            for name in api.definitions(module):
                self.owners[name].append(module.name)

    def find(self, text: str, here: str = "") -> str | None:
        "The full name that `text` stands for in a page about module `here`; None for anything else."
        name = re.sub(r"\(.*\)$", "", text)
        if not re.fullmatch(r"[A-Za-z_][\w.]*", name) or not re.fullmatch(r"[\w.]+(\([^<>`]*\))?", text):
            return None
        if name.startswith("irnb."):
            return self._package(name)
        first, _, rest = name.partition(".")
        owners = self.owners.get(first, [])
        own = here if here in owners else owners[0] if len(owners) == 1 else ""
        plain = re.fullmatch(r"[a-z0-9]+", first) and name == text and own != here  # an everyday word, perhaps not meant as a name
        full = f"{own}.{name}"
        return full if own and not plain and full in self.known else None

    def _package(self, name: str) -> str | None:
        "Also through a package that offers the names of its modules: irnb.strategies.DIL."
        if name in self.known:
            return name
        package, _, last = name.rpartition(".")
        inside = [f"{o}.{last}" for o in self.owners.get(last, []) if o.startswith(package + ".")]
        return inside[0] if len(inside) == 1 and package in self.known else None


def linked(markdown: str, names: Names, here: str = "") -> str:
    "Markdown with public names in backticks as links to the reference; code, headings, maths and links stay."
    def one(match: re.Match) -> str:
        text = match[0]
        if not text.startswith("`") or not (full := names.find(text.strip("`"), here)):
            return text
        return f"{{py:obj}}`{text.strip('`')} <{full}>`"
    return "\n".join(line if line.startswith("#") else re.sub(f"{LINK}|{SPAN}|{MATHS}", one, line) for line in markdown.split("\n"))


def outside_fences(markdown: str, change) -> str:
    "Apply `change` to the prose between fenced code."
    parts = re.split(r"(^[ ]{0,3}(?P<fence>`{3,}|~{3,})[^\n]*\n.*?^[ ]{0,3}(?P=fence)[ ]*$)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if i % 3 == 1 else "" if i % 3 == 2 else change(part) for i, part in enumerate(parts))


def copied(path: Path, out: Path) -> Path:
    "A file of the repository among the sources of the site: where it stands."
    place = Path("files") / path.relative_to(ROOT)
    (out / place).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, out / place)
    return place


def relinked(markdown: str, origin: Path, out: Path) -> str:
    "Links right in the repository made right in the site; pictures are copied; ValueError for a file that is not there."
    here = staged(origin).parent

    def one(match: re.Match) -> str:
        bang, text, target = match[1], match[2], match[3]
        if re.match(r"[a-z][a-z+.-]*:|#", target):
            return match[0]
        name, mark, anchor = target.partition("#")
        path = Path(os.path.normpath(origin.parent / name))
        if not path.exists():
            raise ValueError(f"{origin.relative_to(ROOT)} links to {target}, which is not there")
        page = staged(path)
        if page is None and path.suffix.lower() in PICTURES and bang:
            page = copied(path, out)
        if page is None:
            return f"{bang}[{text}]({repository()}/{path.relative_to(ROOT).as_posix()}{mark}{anchor})"
        return f"{bang}[{text}]({Path(os.path.relpath(page, here)).as_posix()}{mark}{anchor})"
    return re.sub(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)", one, markdown)


def prose(markdown: str, origin: Path, out: Path, names: Names, here: str) -> str:
    "A Markdown cell or file for the site; files that it includes are copied."
    def included(match: re.Match) -> str:
        path = Path(os.path.normpath(origin.parent / match[1]))
        return f"{{literalinclude}} /{copied(path, out).as_posix()}"
    markdown = re.sub(r"\{literalinclude\} (\S+)", included, markdown)
    return outside_fences(markdown, lambda part: linked(relinked(part, origin, out), names, here))


def directives(source: str) -> tuple[dict[str, str], str]:
    "The `#|` lines of a cell as a dictionary, and the code without them."
    found = re.findall(r"^#\|[ ]*([\w-]+):?[ ]*(.*)$", source, re.MULTILINE)
    return dict(found), re.sub(r"^#\|.*\n?", "", source, flags=re.MULTILINE)


def sentence(markdown: str) -> str:
    "The last sentence of prose, without markup: what a figure below it shows."
    text = re.sub(r"```.*?```|\$\$.*?\$\$", " ", markdown, flags=re.DOTALL)
    blocks = [b for b in re.split(r"\n\s*\n", text) if b.strip() and not re.match(r"\s*[|>]", b)]
    text = re.sub(r"\s+", " ", re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"^#+ ", "", blocks[-1]) if blocks else "")).strip()
    last = re.split(r"(?<=[.?!:]) (?=[A-Z*`])", text)[-1]
    return re.sub(r"[`*$\\_]", "", last)[:300]


def alternative(cell, before: str) -> tuple[str, bool]:
    "The text for a figure of a cell, and whether the author gave it: `#| fig-alt:`, the output's metadata, or the sentence before it."
    given = directives(cell.source)[0].get("fig-alt", "").strip("\"' ")
    for output in cell.get("outputs", []):
        for about in [output.get("metadata", {}), *(v for v in output.get("metadata", {}).values() if isinstance(v, dict))]:
            given = given or str(about.get("alt", ""))
    return (given, True) if given else (f"Figure: {sentence(before)}" if before else "Figure", False)


def figures(cell) -> int:
    "How many pictures a cell shows."
    return sum(any(kind.startswith("image/") for kind in output.get("data", {})) for output in cell.get("outputs", []))


def outputs(cell, origin: Path, out: Path, names: Names, here: str) -> list:
    "Outputs without widgets, which need a kernel; Markdown ones with the site's links and copied pictures, as in prose."
    kept = []
    for output in cell.outputs:
        data = output.get("data", {})
        if any("widget" in kind for kind in data):
            text = "*A control stands here when the notebook runs in JupyterLab.*"
            kept.append(nbformat.v4.new_output("display_data", data={"text/markdown": text, "text/plain": text}))
            continue
        if "text/markdown" in data:
            data["text/markdown"] = prose("".join(data["text/markdown"]), origin, out, names, here)
        kept.append(output)
    return kept


def notebook(path: Path, out: Path, names: Names, ids: set[str] = frozenset(), extra: str = ""):
    "Stage one notebook; `ids` are the cells that the reference links to, `extra` is Markdown for the end."
    nb, cells, before = nbformat.read(path, as_version=4), [], ""
    module = next((m[1] for c in nb.cells if (m := re.search(r"^#\|\s*default_exp\s+(\S+)", c.source, re.MULTILINE))), "")
    here = ("irnb." + module).removesuffix(".__init__") if module else ""
    nb.metadata.pop("widgets", None)
    description = next((m[1] for c in nb.cells if (m := re.search(r"^> (.+)$", c.source, re.MULTILINE))), "")
    nb.metadata["myst"] = {"html_meta": {"description": re.sub(r"[`*$]", "", description)}}
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            before = cell.source
            cell.source = prose(cell.source, path, out, names, here)
            cells.append(cell)
            continue
        flags, code = directives(cell.source)
        if cell.cell_type != "code" or "hide" in flags or "default_exp" in flags:
            continue
        if cell.get("id") in ids:
            cells.append(nbformat.v4.new_markdown_cell(f"({label(here, cell.id)})="))
        tags = [] if code.strip() and flags.get("echo") != "false" else ["remove-input"]
        cell.metadata = nbformat.from_dict({"tags": tags})
        if figures(cell):
            cell.metadata["mystnb"] = {"image": {"alt": alternative(cell, before)[0]}}
        cell.source, cell.outputs = code, outputs(cell, path, out, names, here)
        cells.append(cell)
    nb.cells = cells + ([nbformat.v4.new_markdown_cell(extra)] if extra else [])
    target = out / staged(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, target)


def label(module: str, cell: str) -> str:
    "Name of the place of a cell, for links from the reference."
    return f"cell-{module.replace('.', '-')}-{cell}"


def tree(caption: str, entries: list[str]) -> str:
    "One part of the table of contents."
    return f"```{{toctree}}\n:hidden:\n:titlesonly:\n:caption: {caption}\n\n" + "\n".join(entries) + "\n```"


def short_title(path: Path) -> str:
    "The first heading up to its colon."
    first = next(c.source for c in nbformat.read(path, as_version=4).cells if re.match(r"# ", c.source))
    return re.match(r"# (.+)", first)[1].split(": ")[0]


def contents(notebooks: list[Path], modules: list[api.Module]) -> str:
    "The tables of contents that the front page carries."
    entry = lambda p: f"{short_title(p)} <{staged(p).with_suffix('').as_posix()}>"
    trees = [tree(caption, [entry(p) for p in notebooks if p.relative_to(ROOT / "nbs").match(pattern) and len(p.relative_to(ROOT / "nbs").parts) == len(Path(pattern).parts)])
             for caption, pattern in PARTS.items()]
    trees.append(tree("In your own hands", [n.rpartition(".")[0] for o, n in PAGES.items() if (ROOT / o).exists()]))
    return "\n\n".join([*trees, tree("Reference", ["api/index"])])


def reference(modules: list[api.Module], out: Path, names: Names) -> None:
    "The pages of the reference."
    folder = out / "api"
    folder.mkdir(parents=True)
    for module in modules:
        link = f"[{staged(module.notebook).with_suffix('').as_posix()}](../{staged(module.notebook).as_posix()})"
        links = {name: f"{{ref}}`in the notebook <{label(module.name, module.cells[name])}>`" for name in api.definitions(module)}
        text = api.page(module, {"": link} | links)
        (folder / f"{module.name}.md").write_text(outside_tables_of_fences(text, names, module.name), encoding="utf-8")
    lines = [f"| {{py:mod}}`{m.name}` | {linked(api.escape(m.doc), names)} |" for m in modules]
    text = "\n".join(["# Reference", "", "Every public name, by module, from the docstrings and the comments of the parameters.", "",
                      "| module | what it is about |", "|---|---|", *lines, "", "```{toctree}", ":hidden:", ":titlesonly:", "", *(m.name for m in modules), "```", ""])
    (folder / "index.md").write_text(text, encoding="utf-8")


def outside_tables_of_fences(text: str, names: Names, here: str) -> str:
    "A reference page with links: its directives are fences whose content is prose, so only lines that open one or show code are left."
    lines, verbatim = [], False
    for line in text.split("\n"):
        if line.startswith("```") and not line.startswith("````") and "{" not in line:
            verbatim = line != "```"
        lines.append(line if verbatim or line.startswith(("```", ":", "#")) else linked(line, names, here))
    return "\n".join(lines)


def mathjax(out: Path) -> None:
    "MathJax and its fonts, so that formulas need no network."
    found = importlib.util.find_spec("sphinx-mathjax-offline")
    if found is None:
        raise ModuleNotFoundError("sphinx-mathjax-offline is not installed: pip install 'irnb[docs]'")
    origin = Path(found.origin).parent / "static" / "mathjax"
    for part in ("tex-chtml.js", "output/chtml/fonts", "input/tex/extensions"):
        copy = shutil.copytree if (origin / part).is_dir() else shutil.copyfile
        (out / part).parent.mkdir(parents=True, exist_ok=True)
        copy(origin / part, out / part)


def stage(out: Path) -> None:
    "Write everything that Sphinx reads into `out`."
    from tests.notebooks import notebooks
    every, modules = notebooks(), api.modules(ROOT)
    names = Names(modules)
    for path in every:
        ids = {cell for m in modules if m.notebook == path for cell in m.cells.values()}
        notebook(path, out, names, ids, contents(every, modules) if staged(path) == Path("index.ipynb") else "")
    for origin, page in PAGES.items():
        path = ROOT / origin
        if path.suffix == ".ipynb" and path.exists():
            notebook(path, out, names)
        elif path.exists():
            (out / page).write_text(prose(path.read_text(encoding="utf-8"), path, out, names, ""), encoding="utf-8")
    reference(modules, out, names)
