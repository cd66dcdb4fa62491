# SPDX-License-Identifier: Apache-2.0
"""Shares of tokens that real layers read, as `select_shares.py` recorded them, for `select_decode.py --shares`."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from aqua_attention.errors import AquaError

WITHIN = 0.1
"""How much longer choosing by mass may take than a fixed count of the same mean."""
LEAST_HEAVY = 32
"""Tokens of a head that hold its mass: with none, all would be read."""


class Recorded(NamedTuple):
    """What one length of a file says.

    Attributes:
        length: tokens that the shares were recorded at; mass: the `select_p` that read them.
        layers: shares of the key-value heads by layer.
    """

    length: int
    mass: float
    layers: dict[int, list[float]]


def recorded(path: Path, length: int) -> Recorded:
    """The length of the file that is nearest to this one, by their ratio; an AquaError for another kind of file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        mass, results = float(value["setting"]["select_p"]), value["results"]
        found = min(results, key=lambda each: max(each["length"] / length, length / each["length"]))
        layers = {int(row["layer"]): [float(share) for share in row["shares"]] for row in found["layers"]}
        if not layers or not all(shares and all(0 < each <= 1 for each in shares) for shares in layers.values()):
            raise ValueError
        return Recorded(int(found["length"]), mass, layers)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AquaError(f"{path} holds no shares: make it by benchmarks/select_shares.py --json {path}") from error


def heavy_shares(shares: list[float], length: int, window: int, mass: float) -> list[float]:
    """Of each head, the share of tokens that is to hold the mass, so that with the exact window this share is read.

    Args:
        shares: read, those of the exact window among them; window: tokens of the exact window.
        mass: also the largest share: beyond it, fewer tokens would have to hold less.
    """
    return [min(mass, max(LEAST_HEAVY / length, share - window / length)) for share in shares]


def same_count(read: float, length: int, window: int) -> int:
    """The `select_tokens` that reads as many tokens as a mean share, besides the exact window."""
    return max(1, round(read * length) - window)


def summary(pairs: dict[int, tuple[float, float]]) -> dict[str, Any]:
    """What layers take by mass and by a fixed count of the same mean.

    Args:
        pairs: seconds of both, by layer.

    Returns:
        `mass_seconds` and `count_seconds` (sums over the layers), `ratio` (of these), `worst` and `worst_layer` (the
        largest ratio of a layer), `within` (the share of layers whose ratio is at most 1 + WITHIN).
    """
    ratios = {layer: by_mass / by_count for layer, (by_mass, by_count) in pairs.items()}
    by_mass, by_count = (sum(times) for times in zip(*pairs.values(), strict=True))
    worst = max(ratios, key=ratios.__getitem__)
    within = sum(ratio <= 1 + WITHIN for ratio in ratios.values()) / len(ratios)
    found = {"mass_seconds": by_mass, "count_seconds": by_count, "ratio": by_mass / by_count}
    return found | {"worst": ratios[worst], "worst_layer": worst, "within": within}


def said(found: dict[str, Any]) -> str:
    """A summary in words."""
    by_mass, by_count = (1e6 * found[f"{name}_seconds"] for name in ("mass", "count"))
    return (
        f"all layers: {by_mass:.1f} us by mass, {by_count:.1f} us by a fixed count of the same mean "
        f"({found['ratio']:.2f}); layer {found['worst_layer']} at most ({found['worst']:.2f}); "
        f"{found['within']:.0%} of the layers within {WITHIN:.0%}"
    )
