# SPDX-License-Identifier: Apache-2.0
"""Projections as rows of words: where they come from, and how their energy is spread."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from aqua_attention.report.tables import Table

if TYPE_CHECKING:
    from aqua_attention.calibration.projections import Projections


def provenance_table(projections: Projections) -> Table:
    """Where projections come from and what they fit."""
    calibration = projections.calibration
    parts = _parts(calibration)
    read = [row for part in parts for row in _read(part)]
    if "merged" in calibration:
        windows = f" in windows of {calibration['context']}" if "context" in calibration else ""
        read.insert(0, ["all together", f"{calibration.get('tokens', '?')} tokens{windows}"])
    if names := projections.model["shape"].get("names"):
        read.append(["only the layers", f"{names[0]} to {names[-1]}"])
    versions = dict.fromkeys(str(part.get("library_version", "?")) for part in parts)
    return ["", ""], [
        ["model", projections.model.get("name") or "not recorded"],
        ["fits", projections.fits],
        *read,
        *_basis(projections),
        ["library version", ", ".join(versions)],
    ]


def _basis(projections: Projections) -> list[list[str]]:
    """Which basis, and where a learned one is better."""
    rows = [["basis", "svd (singular vectors)" if projections.basis == "aqua" else projections.basis]]
    learned, tuned = (projections.calibration.get(name) for name in ("learned", "tuned"))
    if learned is None:
        return rows + _tuned(tuned)
    held = list(learned["held_out"].values())
    origins = Counter(origin for layer in held for origin in layer["from"])
    losses = [loss for layer in held for loss in layer["loss"]]
    kept = ", ".join(f"{count} {origin}" for origin, count in origins.most_common())
    windows, last = f"{learned['windows']} windows", learned["last_position"]
    return [
        *rows,
        ["heads", kept],
        ["held-out loss", f"{sum(losses) / len(losses):.2f} of the singular vectors'"],
        ["learned on", windows if last is None else f"{windows}, positions up to {last}"],
        *_tuned(tuned),
    ]


def _tuned(tuned: dict[str, Any] | None) -> list[list[str]]:
    """What tuning has done to the KL divergence on what was held out."""
    if tuned is None:
        return []
    windows = f"{tuned['windows']} windows"
    losses = [f"{name} {before:.4f} to {after:.4f}" for name, (before, after) in tuned["kl"].items()]
    return [
        ["tuned on", windows if tuned["kept"] else f"{windows}; no better, so not kept"],
        ["held-out KL by tuning", ", ".join(losses)],
    ]


def _parts(calibration: dict[str, Any]) -> list[dict[str, Any]]:
    """A calibration, or each of those that were merged."""
    return [one for part in calibration["merged"] for one in _parts(part)] if "merged" in calibration else [calibration]


def _read(calibration: dict[str, Any]) -> list[list[str]]:
    """What one calibration has read."""
    tokens = f"{calibration.get('tokens', '?')} tokens"
    if "inputs" in calibration:
        what = "images" if "images" in calibration else "inputs"
        digest = [f"{what} SHA-256", str(calibration.get("inputs_sha256", "?"))]
        return [["calibrated on", f"{calibration[what]} {what}, {tokens}"], digest]
    facts = {"text SHA-256": "text_sha256", "window seed": "seed"}
    windows = ["calibrated on", f"{tokens} in windows of {calibration.get('context', '?')}"]
    return [windows, *([name, str(calibration.get(key, "?"))] for name, key in facts.items())]


def spectrum_table(rows: Sequence[dict[str, Any]]) -> Table:
    """What `projections.spectrum` returned: dimensions for 90% and 99% of the energy, least to most over heads.

    Of a learned basis also what choosing dimensions costs, relative to the singular vectors, on what was held out.
    """
    titles = ["layer", "key-value heads", "head_dim", "dims for 90%", "dims for 99%"]
    titles += ["learned: loss to svd's"] if any("held_out" in row for row in rows) else []
    cells = []
    for row in rows:
        spans = [f"{min(dims)}-{max(dims)}" for dims in (row["dims_90"], row["dims_99"])]
        losses = row.get("held_out")
        spans += [f"{min(losses):.2f}-{max(losses):.2f}"] if losses else []
        cells.append([str(row["layer"]), str(len(row["dims_90"])), str(row["head_dim"]), *spans])
    return titles, cells
