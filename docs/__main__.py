"""The site, from committed notebooks and sources, without a network: `python -m docs [OUTPUT]` (default: build/docs)."""
from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

from docs.stage import ROOT, mathjax, stage


def build(output: Path) -> int:
    "Stage the sources in output/source, make the pages in output/html; returns Sphinx's exit code, not 0 after any warning."
    from sphinx.cmd.build import main
    source, html = output / "source", output / "html"
    for folder in (source, html):
        if folder.exists():
            shutil.rmtree(folder)
    stage(source)
    mathjax(html / "_static" / "mathjax")
    return main(["-b", "html", "-W", "--keep-going", "-q", "-j", "auto", "-c", str(ROOT / "docs"), "-d", str(output / "doctrees"), "-E",
                 str(source), str(html)])


if __name__ == "__main__":
    start, output = time.perf_counter(), Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "docs").resolve()
    code = build(output)
    if code == 0:
        print(f"{output / 'html' / 'index.html'}: made in {time.perf_counter() - start:.0f} s")
    sys.exit(code)
