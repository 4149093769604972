"""Export, execute, clean the notebooks in place, and make README.md from the index: `python -m tests.notebooks [--readme] [NAME...]`."""
from __future__ import annotations

import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SKIP = re.compile(r"^#\|\s*(notest|slow|gpu)\b", re.MULTILINE)


# The rooms of nbs/bench in reading order, each with its notebooks; a new one goes to the end of its room.
BENCH = {"images": [], "png": [], "decoders": [], "image_files": [], "metrics": [],
         "degradations": ["index", "parameters", "base", "sampling", "blur", "noise", "compression", "weather", "chains"], "demosaic": [],
         "results": ["index", "table", "folder", "measure", "baselines", "statistics", "comparison", "figures"],
         "explorer": ["index", "pictures", "dials", "darkroom", "state", "figure", "cells", "widgets", "view", "curves", "watching"]}


def _order(path: Path) -> tuple[str, int, int, str]:
    "The front page first; then the number in the name, the index of the strategies before their notebooks; then the bench by rooms."
    parts = path.relative_to(ROOT / "nbs").with_suffix("").parts
    if parts[0] != "bench":
        return (path.stem if path.stem != "index" else "" if len(parts) == 1 else "19", 0, 0, "")
    inside = BENCH.get(parts[1], [])
    place = list(BENCH).index(parts[1]) if parts[1] in BENCH else len(BENCH)
    return ("5", place, inside.index(parts[-1]) if parts[-1] in inside else len(inside), path.stem)


def notebooks() -> list[Path]:
    "All notebooks in reading order."
    found = [p for p in (ROOT / "nbs").rglob("*.ipynb") if not p.name.startswith((".", "_")) and ".ipynb_checkpoints" not in p.parts]
    return sorted(found, key=_order)


def execute(path: Path, timeout: int = 600):
    "Run a notebook in a fresh kernel in its own folder, leaving out cells flagged notest, slow or gpu; returns it with outputs."
    import nbformat
    from nbclient import NotebookClient
    nb = nbformat.read(path, as_version=4)
    kept = {i: c.source for i, c in enumerate(nb.cells) if c.cell_type == "code" and SKIP.search(c.source)}
    for i in kept:
        nb.cells[i].source = ""
    NotebookClient(nb, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    for i, source in kept.items():
        nb.cells[i].source = source
    nb.metadata.pop("widgets", None)   # their state is worth nothing without the kernel
    return nb


def _link(match: re.Match) -> str:
    "A link that is right seen from nbs/, made right seen from the root."
    target = match[2]
    if re.match(r"[a-z]+:|#", target):
        return match[0]
    return f"{match[1]}({target.removeprefix('../') if target.startswith('../') else 'nbs/' + target})"


def readme(path: Path = ROOT / "nbs" / "index.ipynb") -> str:
    "The index as Markdown: prose as it is, code fenced (unless hidden), text and Markdown outputs below it."
    import nbformat
    parts = ["<!-- Made from nbs/index.ipynb by `make readme`; edit the notebook. -->"]
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            parts.append(re.sub(r"(\])\(([^)\s]+)\)", _link, cell.source))
        elif cell.cell_type == "code" and not re.search(r"^#\|\s*hide\b", cell.source, re.MULTILINE):
            if not re.search(r"^#\|\s*echo:\s*false", cell.source, re.MULTILINE):
                parts.append("```python\n" + re.sub(r"^#\|.*\n", "", cell.source, flags=re.MULTILINE) + "\n```")
            for out in cell.outputs:
                data = out.get("data", {})
                if "text/markdown" in data:
                    parts.append("".join(data["text/markdown"]))
                elif text := "".join(out.get("text", data.get("text/plain", ""))).rstrip():
                    parts.append("```text\n" + text + "\n```")
    return "\n\n".join(p.strip() for p in parts) + "\n"


def main(arguments: list[str]) -> int:
    "Command line: all notebooks, or those whose path contains one of the given words."
    if "--readme" not in arguments:
        import nbformat
        from nbdev.clean import nbdev_clean
        from nbdev.doclinks import nbdev_export
        nbdev_export()
        for path in notebooks():
            if not arguments or any(word in str(path) for word in arguments):
                start = time.perf_counter()
                nb = execute(path)
                draft = path.with_suffix(".tmp")
                nbformat.write(nb, draft)
                draft.replace(path)
                print(f"{path.relative_to(ROOT)}: {time.perf_counter() - start:.1f} s", flush=True)
        nbdev_clean()
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
