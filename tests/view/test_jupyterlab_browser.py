"""JupyterLab, opened once: a trusted notebook shows pages, another one their pictures."""

import json
import os
import socket
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.request import urlopen

import nbformat
import pytest
from nbformat.sign import NotebookNotary

import mechvlm as mv
from helpers.patch_results import uneven

pytestmark = pytest.mark.browser

NO_NEWS = {"@jupyterlab/apputils-extension:notification": {"checkForUpdates": False, "fetchNews": "false"}}
"""Settings without which JupyterLab asks its own site for news."""

TITLES = {"row": "What “shape” looked at, from position 17", "patches": "What made looked at"}


@pytest.fixture
def lab(tmp_path):
    """A server on a folder of two notebooks with the same outputs, of which only one is trusted.

    Returns its address and the views that the notebooks show.
    """
    inputs, lens, norms = uneven()
    shown = {"row": mv.view.attention_row(inputs, norms, 17), "patches": mv.view.patches(inputs, lens, norms)}
    book = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    for name, view in shown.items():
        output = nbformat.v4.new_output("execute_result", {"text/plain": name, "text/html": view._repr_html_()})
        book.cells.append(nbformat.v4.new_code_cell(name, outputs=[output]))
    folder, data, settings = (tmp_path / name for name in ("books", "data", "settings"))
    for path in (folder, data, settings):
        path.mkdir()
    (settings / "overrides.json").write_text(json.dumps(NO_NEWS))
    nbformat.write(book, folder / "other.ipynb")
    # A signature is of the content: the other notebook is another one.
    book.cells[0].metadata["by"] = "me"
    nbformat.write(book, folder / "mine.ipynb")
    NotebookNotary(data_dir=str(data)).sign(nbformat.read(folder / "mine.ipynb", as_version=4))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        f"--ServerApp.port={port}", f"--ServerApp.root_dir={folder}", "--no-browser", "--allow-root",
        "--IdentityProvider.token=", f"--LabApp.app_settings_dir={settings}",
    ]  # fmt: skip
    home = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_RUNTIME_DIR": "runtime", "JUPYTERLAB_WORKSPACES_DIR": "spaces"}
    env = {**os.environ, "JUPYTER_DATA_DIR": str(data), **{key: str(tmp_path / name) for key, name in home.items()}}
    with open(tmp_path / "log.txt", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options], cwd=folder, env=env, stdout=log, stderr=log
        )
    address = f"http://127.0.0.1:{port}"
    for _ in range(120):
        try:
            urlopen(f"{address}/api").close()
            break
        except URLError:
            assert server.poll() is None, (tmp_path / "log.txt").read_text()[-2000:]
            time.sleep(0.25)
    yield address, shown
    server.terminate()
    try:
        server.wait(5)
    except subprocess.TimeoutExpired:  # it waits for its kernels, which end with it
        server.kill()
        server.wait(20)


def test_jupyterlab_shows_the_pages_and_their_pictures(lab, chromium):
    address, shown = lab
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    page, elsewhere = context.new_page(), []
    page.set_default_timeout(50_000)
    inside = (address, address.replace("http", "ws"), "data:", "blob:", "about:")
    page.on("request", lambda request: None if request.url.startswith(inside) else elsewhere.append(request.url[:200]))
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))

    page.goto(f"{address}/lab/tree/mine.ipynb")
    frames = page.locator(".jp-OutputArea iframe")
    for number, (name, view) in enumerate(shown.items()):
        frames.nth(number).scroll_into_view_if_needed()
        frame = frames.nth(number).content_frame
        frame.locator(".view[data-ready]").wait_for()
        assert frame.locator("h1").inner_text() == TITLES[name]
        assert frames.nth(number).bounding_box()["height"] == view.height
        assert frame.locator("html").evaluate("() => window.origin") == "null", "it cannot reach the notebook"
        layer = frame.locator(".layer output b")
        assert layer.inner_text() == "5"
        frame.locator(".title").click()
        page.keyboard.press("ArrowRight")
        assert layer.inner_text() == "6", "keys work inside"

    page.goto(f"{address}/lab/workspaces/other/tree/other.ipynb")
    pictures = page.locator(".jp-OutputArea img")
    pictures.nth(1).wait_for()
    assert pictures.count() == 2
    assert frames.count() == 0, "frames of a notebook that is not trusted are taken out"
    assert (pictures.evaluate_all("all => all.every(i => i.complete && i.naturalWidth > 400)")) is True
    assert elsewhere == errors == []
    context.close()
