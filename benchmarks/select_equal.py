# SPDX-License-Identifier: Apache-2.0
"""Methods that choose tokens at equal bytes: KL to dense attention where each reads the same share of dense bytes.

    python benchmarks/select_curves.py MODEL ... --json curves.json
    python benchmarks/select_equal.py curves.json --bytes 0.2 --bytes 0.3 --json equal.json

Between two measured budgets of a method the logarithm of KL is taken to be a straight line over the logarithm of the
bytes. Beyond its smallest and its largest budget nothing is said. The lowest KL of a share is marked with a star,
without the oracles, which score for free.
"""

import argparse
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

from aqua_attention.io.files import write_json
from aqua_attention.report.tables import markdown

BYTES = (0.13, 0.2, 0.28, 0.35, 0.45)
ORACLE = "oracle"


def main() -> None:
    """Read, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="what select_curves.py wrote with --json")
    parser.add_argument("--bytes", type=float, action="append", help="share of dense bytes; repeat for several")
    parser.add_argument("--json", type=Path, help="write all figures here")
    given = parser.parse_args()
    try:
        results = json.loads(given.file.read_text(encoding="utf-8"))["results"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"{given.file} is not what select_curves.py writes: {error}")
    shares, found = given.bytes or list(BYTES), []
    for result in results:
        rows = compared(result["rows"], shares)
        found.append({"data": result["data"], "context": result["context"], "bytes": shares, "rows": rows})
        print(f"\n{result['data']}, {result['context']} tokens: KL at equal bytes\n")
        print(markdown(["method", *(f"{share:.0%}" for share in shares)], [cells(row, rows) for row in rows]))
    if given.json is not None:
        write_json(given.json, {"results": found})


def compared(rows: list[dict[str, Any]], shares: list[float]) -> list[dict[str, Any]]:
    """Of each method its KL at each share of the bytes; None where its budgets do not reach."""
    methods: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        methods.setdefault(row["method"], []).append((row["bytes_read"], row["kl"]))
    return [{"method": name, "kl": [at(sorted(each), share) for share in shares]} for name, each in methods.items()]


def at(points: list[tuple[float, float]], share: float) -> float | None:
    """KL at a share of the bytes, between the two points beside it."""
    for (less, before), (more, after) in pairwise(points):
        if less <= share <= more:
            part = math.log(share / less) / math.log(more / less) if more > less else 0.0
            low, high = (math.log(max(each, 1e-12)) for each in (before, after))
            return math.exp(low + part * (high - low))
    return None


def cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """A row of the table."""
    made = [row["method"]]
    for place, kl in enumerate(row["kl"]):
        others = [each["kl"][place] for each in rows if not each["method"].startswith(ORACLE)]
        best = min((each for each in others if each is not None), default=None)
        made.append("" if kl is None else f"{kl:.4f}" + ("*" if kl == best else ""))
    return made


if __name__ == "__main__":
    main()
