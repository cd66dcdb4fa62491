# SPDX-License-Identifier: Apache-2.0
"""The site of README and docs/, where its generator is installed (`make docs` installs it)."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

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
    names = {path.stem for path in files.pages()} - {"README"}
    assert {*names, "index", "RESULTS", "SERVING"} <= {path.stem for path in site.glob("*.html")}


@pytest.mark.slow
def test_the_api_comes_from_docstrings(site):
    page = (site / "api.html").read_text()
    assert "What is multiplied, what is stored, and which tokens are exact." in page
    assert 'id="aqua_attention.attach.door.apply"' in page


@pytest.mark.slow
def test_drawings_follow_the_switch_of_the_site(site):
    page = (site / "how-it-works.html").read_text()
    count = len(list(files.DOCS.glob("images/*.svg")))
    assert len(re.findall(r'\[data-md-color-scheme="slate"\] \.drawing', page)) == count
    assert "prefers-color-scheme:dark){.drawing" not in page


@pytest.mark.slow
def test_links_between_readme_and_docs_hold_on_the_site(site):
    page = (site / "index.html").read_text()
    assert 'href="start.html"' in page
    assert 'href="RESULTS.html"' in page
    assert "docs/" not in "".join(re.findall(r'href="([^"]*)"', page))
