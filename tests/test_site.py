"""The site of docs/ builds without a warning, fetches nothing, and finds our error messages."""

import importlib.util
import json
import re
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

import trl_vlm
from tests.look.helpers import Browser, Tab, find_chromium

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="the extra `docs` is not installed"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Where the site was built; `strict` makes every warning, dead links among them, an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--config-file", str(ROOT / "mkdocs.yml")]
    quiet = {"PATH": "/usr/bin:/bin", "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run([*command, "--site-dir", str(folder)], capture_output=True, text=True, env=quiet)
    assert built.returncode == 0, built.stderr
    return folder


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_every_page_of_docs_is_built_and_in_the_navigation(site):
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix(".html")
        if page.name == "_template.md":
            continue
        name = name.with_name("index.html") if page.name == "README.md" else name
        assert (site / name).exists(), name  # in the navigation, too, or else the strict build would have failed


def test_pages_fetch_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*src="(https?:[^"]+)"', page.read_text())
        links = re.findall(r"<link[^>]*>", page.read_text())
        styles = [link for link in links if re.search(r"""href=["']?https?:""", link) and "canonical" not in link]
        assert not loaded and not styles, (page.name, loaded, styles)


def test_the_search_finds_an_error_message_and_a_class(site):
    index = json.loads((site / "search" / "search_index.json").read_text())
    texts = [entry["text"] for entry in index["docs"]]
    assert any("was begun with other settings" in text for text in texts)
    assert any("DPOConfig" in entry["title"] for entry in index["docs"])


def test_the_search_of_a_browser_puts_the_page_about_a_message_before_the_api(site, tmp_path):
    executable = find_chromium()
    if executable is None:
        pytest.skip("there is no Chromium")
    handler = partial(QuietHandler, directory=str(site))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    browser = Browser(executable, tmp_path)
    try:
        page = f"http://127.0.0.1:{server.server_port}/tasks.html?q=was begun with other settings"
        target = browser.send("Target.createTarget", url=page)["targetId"]
        tab = Tab(browser, browser.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        tab.wait("document.querySelectorAll('.md-search-result__item a').length > 0")
        found = tab.run("[...document.querySelectorAll('.md-search-result__item a')].map(a => a.pathname)")
    finally:
        browser.close()
        server.shutdown()
    assert found[0] == "/troubleshooting.html", found[:10]


def test_the_citation_has_the_version_of_the_package():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == trl_vlm.__version__
