# SPDX-License-Identifier: Apache-2.0
"""The report of a results directory, put together and written as HTML and as Markdown."""

import re
from collections.abc import Callable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from aqua_attention.errors import AquaError, install_extra
from aqua_attention.evaluate.record import Record, make_folder
from aqua_attention.io.files import write_atomically
from aqua_attention.report import svg
from aqua_attention.report.choice import choice_sections
from aqua_attention.report.collect import Collected
from aqua_attention.report.document import Block, Panel, Section, data_of, name_of
from aqua_attention.report.layers import layer_sections
from aqua_attention.report.losses import loss_sections
from aqua_attention.report.record_tables import reason
from aqua_attention.report.scores import image_sections, other_sections, retrieval_sections, task_sections
from aqua_attention.report.speed import speed_sections
from aqua_attention.report.tables import Table, markdown
from aqua_attention.report.transfer import transfer_sections
from aqua_attention.report.verdict import RULE, Verdict, verdicts
from aqua_attention.version import __version__

TITLE = "AQUA attention: what was measured"
IMAGES = "report_images"
MOST_ROWS = 300
"""Of a table in HTML, which stays small enough to be sent about; the Markdown has all."""
PARTS: tuple[tuple[Callable[[Sequence[Record]], list[Section]], str], ...] = (
    (loss_sections, "perplexity"),
    (choice_sections, "select"),
    (retrieval_sections, "needle lines ruler"),
    (task_sections, "tasks"),
    (transfer_sections, "transfer context"),
    (image_sections, "images"),
    (layer_sections, "retention spectrum"),
    (speed_sections, "memory decode generate serve breakeven"),
)
"""What makes the sections, and of which suites. Any other suite has a table, see `other_sections`."""


def sections_of(collected: Collected, progress: Callable[[int, int], None] | None = None) -> list[Section]:
    """All sections that there are records for; what failed or is unused comes last. Calls progress(parts, of all)."""
    sections: list[Section] = []
    for done, (part, _) in enumerate(PARTS, 1):
        sections += part(collected.records)
        if progress:
            progress(done, len(PARTS))
    sections += other_sections(collected.records, [suite for _, suites in PARTS for suite in suites.split()])
    failed = [[r.suite, f"{name_of(r)}; on {data_of(r)}", reason(r), r.command or r.source] for r in collected.failed]
    sections.append(_sentences("Failed settings", ["suite", "setting", "reason", "command"], failed))
    unused = [list(pair) for pair in collected.unused]
    note = "These files were in the folder, but nothing above rests on them."
    sections.append(_sentences("Files not used", ["file", "reason"], unused, note))
    return [section for section in sections if section.blocks]


def _sentences(title: str, titles: list[str], rows: list[list[str]], note: str = "") -> Section:
    return Section(title, [Block("", (titles, rows), words=True)] if rows else [], note)


def facts_of(collected: Collected) -> list[str]:
    """What the figures rest on, a line each: how many settings, when, by which versions, on what."""
    records = [*collected.records, *collected.failed]
    lines = [f"{len(collected.records)} settings measured, {len(collected.failed)} failed"]
    if dates := sorted(str(record.details["started"])[:10] for record in records if record.details.get("started")):
        lines[0] += f"; from {dates[0]} to {dates[-1]}" if dates[0] != dates[-1] else f"; on {dates[0]}"
    found = [(record.model, str(record.details.get("device") or ""), _software(record)) for record in records]
    for title, values in zip(("Models", "Devices", "Measured by"), zip(*found, strict=True), strict=False):
        if known := list(dict.fromkeys(filter(None, values))):
            lines.append(f"{title}: {'; '.join(known)}")
    return [*lines, f"Report by aqua-attention {__version__}"]


def html(sections: Sequence[Section], facts: Sequence[str], found: Sequence[Verdict] = ()) -> str:
    """One page that needs nothing else: no script, no network. Raises AquaError where jinja2 is not installed."""
    given = {"title": TITLE, "sections": sections, "facts": facts, "most": MOST_ROWS, "verdicts": found, "rule": RULE}
    return _template().render(given, light=svg.variables(svg.LIGHT), dark=svg.variables(svg.DARK))


def report_markdown(
    sections: Sequence[Section], facts: Sequence[str], found: Sequence[Verdict] = ()
) -> tuple[str, dict[str, str]]:
    """The same in Markdown, and the SVG of each image by its file name."""
    images: dict[str, str] = {}

    def drawn(panel: Panel) -> str:
        name = f"figure-{len(images) + 1}.svg"
        images[name] = svg.alone(panel.svg)
        return f"![{_words(panel.alt).replace('[', '(').replace(']', ')')}]({IMAGES}/{name})\n"

    parts = [f"# {TITLE}\n"]
    for verdict in found:
        title = f"{_words(verdict.title)}: " if len(found) > 1 else ""
        parts.append(f"{title}**{_words(verdict.sentence)}**\n")
        parts += [drawn(verdict.panel)] if verdict.panel else []
    parts += [f"{_words(line)}\n" for line in ([RULE] if found else []) + list(facts)]
    for section in sections:
        parts += _headed("##", section)
        for block in section.blocks:
            parts += _headed("###", block)
            parts += map(drawn, block.panels)
            titles, rows = block.table
            table = markdown(list(map(_words, titles)), [list(map(_words, row)) for row in rows])
            commands = "".join(f"    {command}\n" for command in block.commands)
            table += f"\nMade by:\n\n{commands}" if commands else ""
            if block.panels:
                table = f"<details><summary>Numbers and command</summary>\n\n{table}\n</details>\n"
            parts.append(table)
    return "\n".join(parts), images


def _headed(signs: str, part: Section | Block) -> list[str]:
    title = [f"{signs} {_words(part.title)}\n"] if part.title else []
    notes = [part.note] if isinstance(part, Section) else [*block_notes(part)]
    return title + [f"{_words(note)}\n" for note in notes if note]


def block_notes(block: Block) -> list[str]:
    """All that is said above a table or drawing: what the figures mean, on what they rest, and what is not known."""
    rests_on = [f"Projections: {'; '.join(block.rests_on)}"] if block.rests_on else []
    return [*filter(None, [block.note]), *rests_on, *block.unsaid]


def write_report(folder: Path, collected: Collected, progress: Callable[[int, int], None] | None = None) -> list[Path]:
    """Write `report.html`, `report.md`, whose paths are returned, and the images of the latter into `folder`.

    Raises:
        AquaError: matplotlib or jinja2 is not installed, or the folder cannot be written.
    """
    _template()  # what is not installed is said before the drawing begins
    sections, facts = sections_of(collected, progress), facts_of(collected)
    found = verdicts(collected.records)
    text, images = report_markdown(sections, facts, found)
    pages = {folder / "report.html": html(sections, facts, found), folder / "report.md": text}
    target = folder / IMAGES
    make_folder(target)
    for name, image in images.items():
        write_atomically(target / name, image.encode())
    # Of an earlier report that had more figures.
    for old in target.glob("figure-*.svg"):
        if old.name not in images:
            old.unlink(missing_ok=True)
    for path, content in pages.items():
        write_atomically(path, content.encode())
    return list(pages)


def _template() -> Any:
    try:
        from jinja2 import Environment
        from markupsafe import Markup
    except ModuleNotFoundError as error:
        raise AquaError(f"aqua report needs jinja2: {install_extra('report')}") from error
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    words = Markup(" class=w")
    environment.filters["notes"] = block_notes
    environment.filters["kinds"] = lambda table: [words if _is_words(table, at) else "" for at in range(len(table[0]))]
    return environment.from_string((files(__package__) / "page.html.j2").read_text(encoding="utf-8"))


def _software(record: Record) -> str:
    details = record.details
    words = [f"aqua-attention {details['version']}"] if details.get("version") else []
    if details.get("commit"):
        digest, *changed = str(details["commit"]).split("-")
        words.append("-".join([f"commit {digest[:12]}", *changed]))
    versions = details.get("versions")
    words += [f"{name} {version}" for name, version in versions.items()] if isinstance(versions, dict) else []
    return ", ".join(words)


def _is_words(table: Table, place: int) -> bool:
    """Whether a column holds words, and is aligned as they are; a word among figures is aligned as these."""
    filled = [row[place] for row in table[1] if row[place]]
    words = [cell for cell in filled if cell[0] not in "+-.0123456789" and cell not in ("NaN", "infinite", "none")]
    return 2 * len(words) > len(filled)


def _words(text: str) -> str:
    """Text that no Markdown takes for HTML or emphasis."""
    return re.sub(r"[\\`*_]", r"\\\g<0>", escape(text, quote=False))
