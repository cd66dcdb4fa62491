# SPDX-License-Identifier: Apache-2.0
"""The page in a real browser: it renders light and dark, fits a phone, and has nothing to complain about."""

from __future__ import annotations

import json
import re
import subprocess
from html import escape

import pytest
import samples

from aqua_attention.report.collect import collect
from aqua_attention.report.page import write_report
from conftest import BROWSER

pytest.importorskip("matplotlib")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="needs Chromium")]
# The page is looked at from outside, in a frame as wide as the screen: a window of a browser has a least width.
PROBE = """<body style="margin:0"><iframe id="page" src="report.html" style="border:0;width:WIDTHpx;height:3000px">
</iframe><pre id="found"></pre><script>
addEventListener("load", () => {
  const page = document.getElementById("page").contentDocument, view = page.defaultView;
  const shown = [...page.querySelectorAll("svg")].filter(svg => svg.getBoundingClientRect().width > 0);
  const boxes = shown.map(svg => svg.getBoundingClientRect());
  const written = shown.flatMap(svg => [...svg.querySelectorAll("text")]);
  const texts = written.map(text => text.getBoundingClientRect().height);
  const tables = [...page.querySelectorAll("section > .table")], main = page.querySelector("main").clientWidth;
  const alone = [...page.querySelectorAll(".panels > figure:only-child")].filter(each => each.querySelector(".wide"));
  const first = [...tables[0].querySelectorAll("tr:nth-child(2) td")];
  const right = each => each.getBoundingClientRect().right;
  document.getElementById("found").textContent = JSON.stringify({
    title: page.title, wide: page.documentElement.scrollWidth, view: page.documentElement.clientWidth,
    figures: boxes.map(box => [box.width, box.height]), right: Math.max(...boxes.map(box => box.right)),
    smallest: Math.min(...texts), paper: view.getComputedStyle(page.body).backgroundColor,
    table: page.querySelector("td").getBoundingClientRect().height,
    hidden: tables.flatMap(table => [...table.querySelectorAll("td")].filter(
      cell => cell.textContent && right(cell) > right(table) + 1).map(cell => cell.textContent)),
    titles: first.map(cell => view.getComputedStyle(cell, "::before").content),
    alone: alone.map(each => Math.max(...[...each.querySelectorAll("svg")].map(svg => svg.clientWidth)) / main),
    verdict: page.querySelector(".verdict").getBoundingClientRect().bottom,
  });
});
</script>"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A report of every suite."""
    folder = samples.write(tmp_path_factory.mktemp("results"))
    write_report(folder, collect(folder))
    return folder


def browse(folder, profile, *options):
    """Run the browser on a probe beside the report; returns its standard output and what it complains about."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    command += ["--allow-file-access-from-files", f"--user-data-dir={profile}", "--hide-scrollbars", *options]
    done = subprocess.run([*command, (folder / "probe.html").as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_and_every_figure_is_visible(folder, tmp_path, width):
    (folder / "probe.html").write_text(PROBE.replace("WIDTH", str(width)))
    out, complaints = browse(folder, tmp_path, "--virtual-time-budget=10000", "--dump-dom")
    assert complaints == []
    found = json.loads(re.search(r'<pre id="found">(.+?)</pre>', out)[1].replace(escape("&"), "&"))
    assert found["title"] == "AQUA attention: what was measured"
    assert found["view"] == width
    assert found["wide"] <= width
    assert found["right"] <= width
    assert len(found["figures"]) > 20
    assert all(across > 250 and down > 80 for across, down in found["figures"])
    assert found["smallest"] >= 8
    assert found["table"] > 10
    # Every figure is on the screen, after the title of its column on a phone; a chart alone has the whole width.
    assert found["hidden"] == []
    assert any("change" in title for title in found["titles"]) == (width < 640)
    assert len(found["alone"]) > 5
    assert min(found["alone"]) > 0.95
    # What is best is on the first screen.
    assert found["verdict"] < 720


def test_a_complaint_would_be_seen(folder, tmp_path):
    """The probe itself is told from one that finds nothing."""
    (folder / "probe.html").write_text("<script>console.error('odd'); missing()</script>")
    _, complaints = browse(folder, tmp_path, "--dump-dom")
    assert len(complaints) == 2


def test_light_and_dark_are_different_pictures(folder, tmp_path):
    (folder / "probe.html").write_text(PROBE.replace("WIDTH", "800"))
    pictures, papers = [], []
    for scheme in (1, 0):  # light, dark
        options = (f"--blink-settings=preferredColorScheme={scheme}", "--window-size=800,3000")
        target = tmp_path / f"{scheme}.png"
        browse(folder, tmp_path / f"picture{scheme}", *options, f"--screenshot={target}")
        pictures.append(target.read_bytes())
        out, complaints = browse(
            folder, tmp_path / f"dom{scheme}", *options, "--virtual-time-budget=10000", "--dump-dom"
        )
        assert complaints == []
        papers.append(json.loads(re.search(r'<pre id="found">(.+?)</pre>', out)[1])["paper"])
    assert papers == ["rgb(255, 255, 255)", "rgb(20, 23, 28)"]
    assert pictures[0] != pictures[1]
    # An empty page compresses to a few kilobytes.
    assert all(len(picture) > 50_000 for picture in pictures)
