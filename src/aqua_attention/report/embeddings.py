# SPDX-License-Identifier: Apache-2.0
"""Embeddings of images: how far they turn, and whose nearest neighbour stays."""

from __future__ import annotations

from collections.abc import Sequence

from aqua_attention.report.document import Block, Section, commands_of, name_of, percent, plain
from aqua_attention.report.record import Record, number
from aqua_attention.report.runs import runs_of

NOTE = (
    "Cosine of each image's embedding to its dense one. Same neighbour: share of the images whose nearest other image "
    "is the one it was."
)


def embedding_sections(records: Sequence[Record]) -> list[Section]:
    """A table for each set of images."""
    titles = ["setting", "products outside the window", "mean cosine", "lowest cosine", "same neighbour"]
    blocks = []
    for title, group in runs_of(records, "images").items():
        rows = [_row(record) for record in group]
        blocks.append(Block(title or "Images", "", (titles, rows), commands_of(group)))
    return [Section("Images", NOTE, blocks)] if blocks else []


def _row(record: Record) -> list[str]:
    result = record.result or {}
    cosines = [plain(number(result.get(name)), ".4f") for name in ("mean_cosine", "lowest_cosine")]
    return [
        name_of(record),
        percent(number(result.get("mean_k")), 0),
        *cosines,
        percent(number(result.get("same_neighbour"))),
    ]
