# SPDX-License-Identifier: Apache-2.0
"""The site of README and docs/, where its generator is installed (`make site` installs it)."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from conftest import BROWSER
from pages import files

pytest.importorskip("mkdocs", reason="the extra docs is not installed")
pytest.importorskip("mkdocstrings", reason="the extra docs is not installed")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-f", files.ROOT / "mkdocs.yml", "-d", folder]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_every_page_is_there(site):
    names = {str(path.relative_to(files.DOCS).with_suffix("")) for path in files.pages() if path != files.README}
    made = {str(path.relative_to(site).with_suffix("")) for path in site.rglob("*.html")}
    assert {*names, "index", "SERVING"} <= made


@pytest.mark.slow
def test_the_api_comes_from_docstrings(site):
    page = (site / "api.html").read_text()
    assert "What is multiplied, what is stored, and which tokens are exact." in page
    assert 'id="aqua_attention.attach.door.apply"' in page


@pytest.mark.slow
def test_drawings_follow_the_switch_of_the_site(site):
    page = (site / "how-it-works.html").read_text()
    count = len(set(files.DOCS.glob("images/*.svg")) - {files.LIGHT, files.DARK})
    assert len(re.findall(r'\[data-md-color-scheme="slate"\] \.drawing', page)) == count
    assert "prefers-color-scheme:dark){.drawing" not in page


@pytest.mark.slow
def test_links_between_readme_and_docs_hold_on_the_site(site):
    page = (site / "index.html").read_text()
    assert 'href="start.html"' in page
    assert 'href="results/loss.html"' in page
    assert "docs/" not in "".join(re.findall(r'href="([^"]*)"', page))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["index.html", "results.html"])
def test_the_picture_follows_the_switch_of_the_site(site, name):
    page = (site / name).read_text()
    assert '[data-md-color-scheme="slate"] .figure{' in page
    assert "<picture>" not in page


@pytest.mark.slow
def test_pages_of_results_link_to_pages_beside_and_above_them(site):
    page = (site / "results" / "tasks.html").read_text()
    assert 'href="loss.html"' in page
    assert 'href="../SERVING.html"' in page
    assert "<summary>" in page


# In frames as wide as the screen, because a window of a browser has a least width. What scrolls by itself may be wider.
PROBE = """<pre id="found"></pre><script>
(async () => {
  const found = {};
  for (const name of PAGES) {
    const frame = document.createElement("iframe");
    frame.style = "border:0;width:WIDTHpx;height:900px";
    frame.src = name;
    document.body.append(frame);
    await new Promise(loaded => frame.onload = loaded);
    const root = frame.contentDocument.documentElement;
    found[name] = [root.scrollWidth, root.clientWidth];
    frame.remove();
  }
  document.getElementById("found").textContent = JSON.stringify(found);
})();
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_no_page_is_wider_than_the_screen(site, tmp_path, width):
    names = sorted(str(path.relative_to(site)) for path in site.rglob("*.html") if path.name != "probe.html")
    probe = site / "probe.html"
    probe.write_text(PROBE.replace("PAGES", json.dumps(names)).replace("WIDTH", str(width)))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path}", "--virtual-time-budget=120000", probe.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    found = json.loads(re.search(r'<pre id="found">(.+?)</pre>', done.stdout)[1])
    assert len(found) > 25
    assert {name for name, (wide, view) in found.items() if wide > view or view > width} == set()


def test_links_of_a_page_one_folder_down_are_those_of_the_site():
    from pages import site as hook

    assert hook.relinked("[a](../../DESIGN.md) [b](../limits.md) [c](loss.md)", 1) == (
        "[a](../DESIGN.md) [b](../limits.md) [c](loss.md)"
    )
    assert hook.relinked('[a](../DESIGN.md) <img src="docs/images/x.svg">') == '[a](DESIGN.md) <img src="images/x.svg">'
