# SPDX-License-Identifier: Apache-2.0
"""README and docs/ stay short, plain and linked, and their tables say what the code says."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from pages import files, links, prose, settings, style

PAGES = files.pages()
LINKED = [*PAGES, *(files.ROOT / name for name in files.ROOT_PAGES)]
LONGEST_README = 150
AT_THE_ROOT = [files.ROOT / name for name in ("SERVING.md", "CONTRIBUTING.md", "DESIGN.md")]


def name_of(path):
    return str(path.relative_to(files.ROOT))


@pytest.mark.parametrize("path", [*PAGES, *AT_THE_ROOT], ids=name_of)
def test_sentences_are_short_on_average(path):
    assert prose.average(path.read_text()) <= prose.MOST_WORDS


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_no_sentence_is_very_long(path):
    text = path.read_text()
    longest = max(prose.sentences(text), key=prose.words)
    assert prose.words(longest) <= prose.LONGEST, longest


@pytest.mark.parametrize("path", [*PAGES, *AT_THE_ROOT, files.ROOT / "CHANGELOG.md"], ids=name_of)
def test_pages_have_no_unwanted_words(path):
    assert list(style.unwanted(path)) == []


def test_sources_have_no_unwanted_words():
    assert len(style.sources()) > 200
    assert [line for path in style.sources() for line in style.unwanted(path)] == []


def test_unwanted_words_are_found_by_line(tmp_path):
    page, source = tmp_path / "a.md", tmp_path / "a.py"
    page.write_text("Adjust it.\nSimply `just` use\n\n```sh\njust\n```\nit in\norder to leverages.\n")
    source.write_text('"""It was just written."""\nname = utilized\n')
    said = [line.rpartition(": ")[0] for line in style.unwanted(page)]
    assert said == ["a.md:2: 'simply'", "a.md:7: 'in order to'", "a.md:8: 'leverage'"]
    assert list(style.unwanted(source)) == ["a.py:2: 'utilize': use"]


@pytest.mark.parametrize("path", LINKED, ids=name_of)
def test_links_lead_somewhere(path):
    assert list(links.broken(path)) == []


def test_the_readme_is_short():
    assert len(files.README.read_text().splitlines()) <= LONGEST_README


def test_every_page_is_in_the_navigation():
    named = set(re.findall(r": ([\w/-]+\.md)$", (files.ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    in_docs = {str(path.relative_to(files.DOCS)) for path in files.DOCS.rglob("*.md")}
    assert named == in_docs | {"index.md", *files.ROOT_PAGES}


def test_the_tables_of_settings_are_those_of_the_declaration():
    page = settings.PAGE.read_text()
    assert page == settings.generated(page), "run: make docs"


def test_a_stale_table_is_found():
    page = settings.PAGE.read_text()
    stale = page.replace("| `0.9` | `0.75` |", "| `0.8` | `0.75` |")
    assert stale != page
    assert settings.generated(stale) == page


@pytest.mark.parametrize("path", sorted(files.DOCS.glob("images/*.svg")), ids=name_of)
def test_drawings_are_well_formed_and_follow_light_and_dark(path):
    root = ElementTree.parse(path).getroot()
    text = path.read_text()
    assert root.get("viewBox")
    if path in (files.LIGHT, files.DARK):
        assert root.get("aria-label")
    else:
        assert "@media(prefers-color-scheme:dark)" in text
        assert re.search(r'aria-labelledby="([\w-]+)"><title id="\1">', text.replace("\n", ""))
    assert any(path.name in page.read_text() for page in PAGES)


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("One two three. Four five.", [3, 2]),
        ("One `a b c` two: Three [four five](six.md).", [3, 3]),
        ("| a | table |\n\n# Heading\n\n```sh\ncode here\n```\n\n- Item one\n  goes on.\n- Item two.", [4, 2]),
        ("It is v0.5. Then 1.33 more (e.g. this). **Bold** word!", [3, 5, 2]),
        ("", []),
    ],
)
def test_words_of_sentences_are_counted(text, lengths):
    assert list(map(prose.words, prose.sentences(text))) == lengths


def test_broken_links_are_found(tmp_path):
    (tmp_path / "a.md").write_text(
        "# One `two`\n\n[x](b.md) [x](a.md#one-two) [x](#three) [x](https://x.y) `[x](c.md)`\n"
    )
    assert list(links.broken(tmp_path / "a.md")) == ["b.md: there is no b.md", "#three: a.md has no heading three"]
