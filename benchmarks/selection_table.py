# SPDX-License-Identifier: Apache-2.0
"""What each way of choosing dimensions loses, at 3/4, 1/2 and 1/4 of them: static, unrotated, AQUA and ours.

    python benchmarks/selection_table.py smollm2 --calibration train.txt --evaluation test.txt --json table.json

Calibrates on the first `--windows` windows (with `--seed N`: on windows spread over the text), evaluates on the first
`--test-windows` of the evaluation text, and prints a Markdown
table of perplexity change and KL divergence against the dense model in the same run.
"""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.progress import Progress

import aqua_attention as aqua
from aqua_attention.data.text import token_windows, tokenize
from aqua_attention.evaluate.setting import Setting, Subject
from aqua_attention.evaluate.suites.perplexity import evaluate_perplexity
from aqua_attention.io.files import write_json

RATIOS = (0.75, 0.5, 0.25)
ERRORS = (0.05, 0.1, 0.2, 0.4)


def methods(recent: int) -> dict[str, tuple[str, dict[str, object]]]:
    """Column title -> (basis, AquaConfig fields besides k_ratio)."""
    window = {"selection": "weighted", "sink": 4, "recent": recent}
    return {
        "static slice": ("aqua", {"selection": "static"}),
        "unrotated top-k": ("none", {}),
        "AQUA (paper)": ("aqua", {}),
        "weighted": ("aqua", {"selection": "weighted"}),
        f"weighted, 4 + {recent} exact": ("aqua", window),
        "same, share=group": ("aqua", window | {"share": "group"}),
    }


def adaptive(recent: int) -> tuple[list[str], list[Setting]]:
    """Column titles and settings of adaptive k: a row an allowed error, a column a share."""
    window = {"selection": "weighted", "sink": 4, "recent": recent}
    shares = ("head", "group")
    settings = [Setting(aqua.AquaConfig(logit_error=e, share=share, **window)) for e in ERRORS for share in shares]
    return [f"share={share}: change (KL), mean k" for share in shares], settings


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, help="text to calibrate on")
    parser.add_argument("--evaluation", required=True, help="text to evaluate on")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--test-windows", type=int, default=10)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--seed", type=int, help="spread the calibration windows over the text by this seed")
    parser.add_argument("--recent", type=int, default=128)
    parser.add_argument("--adaptive", action="store_true", help="a table of logit_error instead of k_ratio")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device")
    parser.add_argument("--json", help="write the rows here")
    options = parser.parse_args()

    model, tokenizer = aqua.load_model(options.model, dtype=options.dtype, device=options.device)
    context = options.context
    if options.adaptive:
        columns, settings = adaptive(options.recent)
    else:
        columns = list(methods(options.recent))
        settings = [
            Setting(aqua.AquaConfig.paper(k_ratio=ratio, **fields), basis)
            for ratio in RATIOS
            for basis, fields in methods(options.recent).values()
        ]
    ids, prefix = tokenize(tokenizer, aqua.load_text(options.evaluation))
    windows = token_windows(ids, tokens=options.test_windows * context, context=context, seed=None, prefix=prefix)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("calibrate")
        projections = aqua.calibrate(
            model,
            tokenizer,
            aqua.load_text(options.calibration),
            tokens=options.windows * context,
            context=context,
            seed=options.seed,
            name=options.model,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
        task = progress.add_task("evaluate")
        result = evaluate_perplexity(
            Subject(options.model, model, tokenizer, projections),
            settings,
            windows,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if options.json:
        write_json(options.json, result)
    print(f"dense perplexity {result['dense']['perplexity']:.2f}, {result['dense']['tokens']} tokens\n")
    print(f"| {'logit_error' if options.adaptive else 'k_ratio'} | " + " | ".join(columns) + " |")
    print("|---|" + "---|" * len(columns))
    rows = iter(result["rows"])
    for first in ERRORS if options.adaptive else RATIOS:
        cells = [
            f"{row['perplexity_change']:+.2%} ({row['kl']:.4f})" + _share(row)
            for _, row in zip(columns, rows, strict=False)
        ]
        print(f"| {first} | " + " | ".join(cells) + " |")


def _share(row: dict) -> str:
    """Of an adaptive row: the mean share of dimensions, and the least and the largest of a layer."""
    if row["setting"]["logit_error"] is None:
        return ""
    layers = row["mean_k_per_layer"]
    return f", {row['mean_k']:.2f} (layers {min(layers):.2f}-{max(layers):.2f})"


if __name__ == "__main__":
    main()
