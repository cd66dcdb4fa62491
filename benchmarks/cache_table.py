# SPDX-License-Identifier: Apache-2.0
"""What a smaller cache loses, alone and together with fewer products: s_ratio, int8 and int4 at k_ratio 1, 3/4 and 1/2.

    python benchmarks/cache_table.py smollm2 -p smollm2.safetensors --evaluation test.txt --json table.json

Selection is weighted, with an exact window of 4 + 64. Prints a Markdown table of perplexity change, KL divergence and
top-1 agreement against the dense model in the same run.
"""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.progress import Progress

import aqua_attention as aqua
from aqua_attention.evaluate.perplexity import evaluate_perplexity
from aqua_attention.evaluate.setting import Setting
from aqua_attention.files import write_json
from aqua_attention.text import token_windows, tokenize

RATIOS = (1.0, 0.75, 0.5)
CACHES = {
    "whole": {},
    "s_ratio 0.1": {"s_ratio": 0.1},
    "s_ratio 0.25": {"s_ratio": 0.25},
    "int8": {"bits": 8},
    "int4": {"bits": 4},
    "int8, s_ratio 0.25": {"bits": 8, "s_ratio": 0.25},
}


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("-p", "--projections", required=True)
    parser.add_argument("--evaluation", required=True, help="text to evaluate on")
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device")
    parser.add_argument("--json", help="write the rows here")
    options = parser.parse_args()

    model, tokenizer = aqua.load_model(options.model, dtype=options.dtype, device=options.device)
    ids, prefix = tokenize(tokenizer, aqua.load_text(options.evaluation))
    windows = token_windows(
        ids, tokens=options.windows * options.context, context=options.context, seed=None, prefix=prefix
    )
    settings = [
        Setting(aqua.AquaConfig(k_ratio=ratio, selection="weighted", sink=4, recent=64, **fields))
        for fields in CACHES.values()
        for ratio in RATIOS
    ]
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("evaluate")
        result = evaluate_perplexity(
            model,
            aqua.Projections.load(options.projections),
            settings,
            windows,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if options.json:
        write_json(options.json, result)
    print(f"dense perplexity {result['dense']['perplexity']:.2f}, {result['dense']['tokens']} tokens\n")
    print("| cache | " + " | ".join(f"k_ratio {ratio:g}" for ratio in RATIOS) + " |")
    print("|---|" + "---|" * len(RATIOS))
    rows = iter(result["rows"])
    for name in CACHES:
        cells = [
            f"{row['perplexity_change']:+.2%} ({row['kl']:.4f}, {row['top1']:.1%})"
            for _, row in zip(RATIOS, rows, strict=False)
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
