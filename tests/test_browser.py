"""Run `04-generate` up to its sliders in JupyterLab, as a reader would, and move one: a real server and Chromium."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

pytest.importorskip("jupyterlab", reason="JupyterLab is not installed: the browser test needs it")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")

ROOT = Path(__file__).parents[1]
NOTEBOOK = "04-generate.ipynb"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SECONDS = 420
SETTINGS = {
    # Every cell stays in the page, so that the page can be searched; no news feed.
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium"),
]


@pytest.fixture
def lab(tmp_path) -> Iterator[str]:
    """The address of a JupyterLab server on a copy of the notebooks, outputs cleared."""
    folder = tmp_path / "notebooks"
    shutil.copytree(
        ROOT / "notebooks", folder, ignore=shutil.ignore_patterns("work", ".ipynb_checkpoints", "conftest.py")
    )
    notebook = nbformat.read(folder / NOTEBOOK, as_version=4)
    notebook.cells = up_to_the_sliders(notebook.cells)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, folder / NOTEBOOK)
    for name, values in SETTINGS.items():
        path = tmp_path / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces"),
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.root_dir={folder}"]
    command += ["--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--IdentityProvider.token="]
    with open(tmp_path / "server.log", "w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for(address, server, tmp_path / "server.log")
            yield address
        finally:
            server.terminate()  # the server ends its kernels
            server.wait(60)


def up_to_the_sliders(cells: list) -> list:
    """nbval runs the others; the sliders need a browser."""
    last = next(i for i, cell in enumerate(cells) if cell.cell_type == "code" and "interact(" in cell.source)
    return cells[: last + 1]


def wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(120):
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{address}/api/status", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"JupyterLab did not start: {log.read_text()[-1500:]}")


def results() -> Path:
    """The folder for screenshots, ignored by git."""
    folder = ROOT / "test-results"
    folder.mkdir(exist_ok=True)
    (folder / ".gitignore").write_text("*\n")
    return folder


def test_run_all_shows_the_images_and_a_slider_changes_one(lab, tmp_path):
    cells = up_to_the_sliders(nbformat.read(ROOT / "notebooks" / NOTEBOOK, as_version=4).cells)
    code = [cell for cell in cells if cell.cell_type == "code"]
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch_persistent_context(
            tmp_path / "profile",
            executable_path=CHROMIUM,
            headless=True,
            args=OPTIONS,
            viewport={"width": 1280, "height": 1400},
        )
        try:
            page = browser.new_page()
            page.goto(f"{lab}/lab/tree/{NOTEBOOK}?reset")
            page.locator(".jp-CodeCell").first.wait_for(timeout=60_000)
            run_all(page)
            wait_until_done(page, len(code))
            look_at(page)
            move_a_slider(page)
        finally:
            browser.close()


def run_all(page) -> None:
    """The menu, once the kernel is running; earlier, JupyterLab would ask which kernel to start."""
    page.get_by_text("| Idle").wait_for(timeout=90_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()


def wait_until_done(page, cells: int) -> None:
    """Wait until every code cell has its number, or one shows an error."""
    deadline = time.monotonic() + SECONDS
    done: list[str] = []
    while time.monotonic() < deadline:
        errors = page.locator("[data-mime-type='application/vnd.jupyter.error']").all_inner_texts()
        assert not errors, errors[0][-1500:]
        prompts = page.locator(".jp-CodeCell .jp-InputPrompt").all_inner_texts()
        done = [text for text in prompts if text.strip(" []:").isdigit()]
        if len(done) == cells:
            return
        page.wait_for_timeout(2000)
    raise AssertionError(f"after {SECONDS} s {len(done)} of {cells} code cells had run")


def look_at(page) -> None:
    """No error output, nothing on stderr but progress bars, and every image loaded with a non-zero size."""
    assert page.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0
    pictures = page.locator(".jp-OutputArea-output img")
    sizes = [picture.evaluate("image => [image.naturalWidth, image.naturalHeight]") for picture in pictures.all()]
    assert len(sizes) >= 4 and all(min(size) >= 100 for size in sizes), f"images in the page: {sizes}"
    pictures.first.scroll_into_view_if_needed()
    page.wait_for_timeout(500)
    page.screenshot(path=results() / "04-generate-1.png")


def move_a_slider(page) -> None:
    """The arrow key moves the handle of the slider of steps by one value; the image and the readout must follow."""
    widget = page.locator(".widget-interact")
    image, handle = widget.locator("img"), widget.locator(".noUi-handle").last
    handle.scroll_into_view_if_needed()
    before, readout = image.get_attribute("src"), widget.locator(".widget-readout").last
    shown = readout.inner_text()
    page.screenshot(path=results() / "04-generate-slider-before.png")
    for _ in range(3):
        handle.press("ArrowLeft")
    page.wait_for_function("before => document.querySelector('.widget-interact img')?.src !== before", arg=before)
    page.get_by_text("| Idle").wait_for()
    page.wait_for_timeout(1000)
    page.screenshot(path=results() / "04-generate-slider-after.png")
    assert readout.inner_text() != shown and image.get_attribute("src") != before
