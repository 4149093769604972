"""The explorer in JupyterLab, driven in headless Chromium: run the notebook, move a slider by keyboard, open a cell of the map, look at it on a phone."""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.browser import DESKTOP, PHONE, browser, missing
from tests.notebooks import ROOT

pytestmark = pytest.mark.slow
TOKEN = "irnb-test"
NOTEBOOK = "nbs/bench/explorer/index.ipynb"
KEYS = int(os.environ.get("IRNB_KEYS", 3))   # on the slider; more of them for a measurement


def _settings(folder: Path) -> None:
    "User settings of JupyterLab: no news, no updates, and all cells in the page rather than those in view."
    for plugin, values in {"apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False}, "notebook-extension/tracker": {"windowingMode": "none"}}.items():
        path = folder / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(values))


def _copy(folder: Path) -> Path:
    "A folder with the notebook and the results that it reads; no model of the pipeline, as in a fresh clone."
    copy = folder / NOTEBOOK
    copy.parent.mkdir(parents=True)
    shutil.copy(ROOT / NOTEBOOK, copy)
    shutil.copytree(ROOT / "results" / "default", folder / "results" / "default")
    return copy


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/api/status?token={TOKEN}", timeout=5).close()
        return True
    except (urllib.error.URLError, OSError):
        return False


@contextmanager
def lab(folder: Path):
    "JupyterLab on a free port, with settings and kernels of its own; yields its address."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    _settings(folder / "settings")
    own = {name: str(folder / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")}
    env = os.environ | own | {"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--ServerApp.ip=127.0.0.1", "--allow-root",
               f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={folder}", "--LabApp.expose_app_in_browser=True", "--ServerApp.log_level=ERROR",
               "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with open(folder / "lab.log", "wb") as log, subprocess.Popen(command, env=env, cwd=folder, stdout=log, stderr=log) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + 60
            while not _answers(url):
                assert process.poll() is None and time.monotonic() < deadline, (folder / "lab.log").read_text()
                time.sleep(0.1)
            yield url
        finally:
            process.terminate()   # takes its kernels with it
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _slider(b, label: str):
    "The handle of the slider with this label."
    return b.driver.find_element("xpath", f"//label[normalize-space()='{label}']/following-sibling::div//div[@role='slider']")


def _pictures(b) -> list[str]:
    "A fingerprint of every picture of the explorer, in order: its size and the sum of its pixels."
    return b.js("""[...document.querySelectorAll('.irnb-column img')].filter(i => i.complete && i.naturalWidth).map(i => {
        const c = document.createElement('canvas'); c.width = i.naturalWidth; c.height = i.naturalHeight;
        const g = c.getContext('2d'); g.drawImage(i, 0, 0);
        return c.width + 'x' + c.height + ':' + g.getImageData(0, 0, c.width, c.height).data.reduce((a, v, k) => (a + v * (k % 251)) % 4294967291, 0) })""")


def _run_all(b, url: str) -> None:
    "Open the notebook and run every cell."
    b.get(f"{url}/lab/tree/{NOTEBOOK}?token={TOKEN}")
    b.wait(".jp-Notebook .jp-Cell", 60)
    b.wait(lambda b: b.js("!!(window.jupyterapp && window.jupyterapp.commands.hasCommand('notebook:run-all-cells'))"), 30)
    b.wait(lambda b: b.js("(async () => { const s = window.jupyterapp.shell.currentWidget.sessionContext; await s.ready; return !!s.session?.kernel })()"), 60)
    b.driver.execute_script("window.ran = false; window.jupyterapp.commands.execute('notebook:run-all-cells').then(() => window.ran = true)")


def _scroll(b, css: str) -> None:
    b.driver.execute_script(f"document.querySelector('{css}').scrollIntoView({{block: 'start'}})")


def _shown(b) -> int:
    "How many pictures of the explorer are there."
    return b.js("[...document.querySelectorAll('.irnb-column img')].filter(i => i.complete && i.naturalWidth).length")


def _respond(b, handle, key) -> list[float]:
    "Milliseconds from a key on a slider to the last new picture of each column, decoded and about to be painted, by the browser's own clock."
    b.driver.execute_script("""
        window.pressed = 0; window.drawn = [];
        document.addEventListener('keydown', () => { window.pressed = performance.now() }, {capture: true, once: true});
        document.querySelectorAll('.irnb-column').forEach((column, k) => { for (const i of column.querySelectorAll('img'))
            i.onload = () => requestAnimationFrame(() => { window.drawn[k] = performance.now() }) })""")
    handle.send_keys(key)
    time.sleep(0.8)   # asking now would take time from the page
    b.wait(lambda b: b.js("window.drawn[3] && performance.now() - Math.max(...window.drawn.filter(t => t)) > 500"), 30)
    return b.js("window.drawn.map(t => t ? Math.round(t - window.pressed) : 0)")


@pytest.mark.skipif(bool(missing()), reason=missing() or "there is a browser")
def test_explorer_in_jupyterlab(tmp_path):
    pytest.importorskip("jupyterlab")
    from selenium.webdriver.common.keys import Keys
    _copy(tmp_path)
    shots = Path(os.environ.get("IRNB_SCREENSHOTS", tmp_path))
    with lab(tmp_path) as url, browser(DESKTOP) as b:
        _run_all(b, url)
        b.wait(lambda b: _shown(b) == 16, 120)   # four pictures of truth, degraded, and two restorers
        b.wait(lambda b: b.js("window.ran"), 120)
        assert not b.find(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']"), "a cell wrote to stderr"
        _scroll(b, ".irnb-view")
        b.screenshot(shots / "lab_desktop.png")

        before, head = _pictures(b), b.find(".irnb-head")[1].text
        handle = _slider(b, "sigma /255")
        taken = [_respond(b, handle, key) for key in [*[Keys.ARROW_RIGHT] * (KEYS - 1), Keys.PAGE_DOWN]]   # every value is a new one: nothing is remembered
        after = _pictures(b)
        assert before[4] != after[4] and before[8] != after[8], "degraded and restored follow the slider"
        assert before[0] == after[0] and b.find(".irnb-head")[1].text != head
        middle = [sorted(t[k] for t in taken)[len(taken) // 2] for k in (1, 2, 3)]
        print(f"from key to picture, median of {len(taken)} keys: degraded {middle[0]} ms, network {middle[1]} ms, wavelets {middle[2]} ms; each {taken}")

        unnamed = b.js("[...document.querySelectorAll('.irnb-column img')].filter(i => !(i.alt || i.title)).length")
        assert unnamed == 0, "every picture has a name for screen readers"
        figure = b.js("[...document.querySelectorAll('.jp-OutputArea img')].filter(i => i.alt.startsWith('Columns of pictures')).length")
        assert figure >= 1, "the static figure has its text"

        toggle = b.driver.find_element("xpath", "//button[contains(., 'generalisation map')]")
        toggle.send_keys(Keys.ENTER)
        cells = b.wait(".irnb-map button")
        cell = next(c for c in cells if c.get_attribute("title").startswith("supervised, sigma_50"))
        cell.send_keys(Keys.SPACE)
        b.wait(lambda b: "supervised, sigma_50 (unseen)" in b.js("document.querySelector('.irnb-note').textContent"))
        _scroll(b, ".irnb-map")
        b.screenshot(shots / "lab_map.png")

        b.resize(PHONE)
        b.driver.execute_script("window.jupyterapp.commands.execute('application:set-mode', {mode: 'single-document'});"
                                "window.jupyterapp.shell.collapseLeft()")
        time.sleep(1)
        _scroll(b, ".irnb-columns")
        b.screenshot(shots / "lab_phone.png")
        wide = b.js("document.querySelector('.irnb-columns').getBoundingClientRect().width")
        assert 150 < wide <= PHONE[0]
        assert not b.errors(ignore=("favicon", "/api/contents", "workspaces"))
