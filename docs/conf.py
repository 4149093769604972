"""Sphinx settings of the site; the sources are staged by docs/stage.py, see docs/__main__.py."""
import configparser
from pathlib import Path

_settings = configparser.ConfigParser()
_settings.read(Path(__file__).parent.parent / "settings.ini")
_about = _settings["DEFAULT"]

project, author, version = _about["title"], _about["author"], _about["version"]
release, copyright = version, _about["copyright"]
language = "en"
extensions = ["myst_nb", "sphinx.ext.mathjax"]
nb_execution_mode = "off"                        # the committed outputs are what the site shows
nb_render_markdown_format = "myst"               # tables in Markdown outputs
nb_merge_streams = True
nb_mime_priority_overrides = [("html", "text/markdown", 0)]
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "attrs_inline"]
myst_heading_anchors = 4
myst_heading_slug_func = "docs.stage.jupyter_slug"  # as in JupyterLab, so that links to headings work in both
add_module_names = False
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 88
exclude_patterns = ["files"]

html_theme = "furo"
html_title = "irnb"
html_static_path, html_js_files = ["static"], ["search_math.js"]
html_css_files = ["irnb.css"]
html_copy_source = html_show_sourcelink = html_show_sphinx = False
html_baseurl = f"{_about['doc_host']}{_about['doc_baseurl']}/"
pygments_style, pygments_dark_style = "a11y-high-contrast-light", "a11y-high-contrast-dark"
# MathJax 3.2 from the package sphinx-mathjax-offline, copied by docs/__main__.py. No menu: it loads parts that we do not ship.
mathjax_path = "mathjax/tex-chtml.js"
mathjax3_config = {"options": {"enableMenu": False}}
