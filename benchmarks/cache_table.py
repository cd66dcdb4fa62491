# SPDX-License-Identifier: Apache-2.0
"""What a smaller cache loses, alone and together with fewer products: dimensions, bits and tokens.

    python benchmarks/cache_table.py smollm2 -p smollm2.safetensors --evaluation test.txt --json table.json

Selection is weighted, with an exact window of 4 + 64, k_ratio 1, 3/4 and 1/2. Prints two Markdown tables of perplexity
change, KL divergence and top-1 agreement against the dense model: of whole windows, and, with eviction, of the second
halves of windows, read in chunks of 128 tokens after the first half was evicted from.
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

RATIOS = (1.0, 0.75, 0.5)
OURS = {"selection": "weighted", "share": "head", "sink": 4, "recent": 64}
CACHES = {
    "whole": {},
    "s_ratio 0.1": {"s_ratio": 0.1},
    "s_ratio 0.25": {"s_ratio": 0.25},
    "s_ratio 0.25, no exact window": {"s_ratio": 0.25, "sink": 0, "recent": 0},
    "int8": {"bits": 8},
    "int4": {"bits": 4},
    "int8, s_ratio 0.25": {"bits": 8, "s_ratio": 0.25},
    "int4, s_ratio 0.25": {"bits": 4, "s_ratio": 0.25},
}
EVICTIONS = {
    "whole": {},
    "h2o 0.5": {"h2o_ratio": 0.5},
    "h2o 0.25": {"h2o_ratio": 0.25},
    "h2o 0.5 by 64 queries": {"h2o_ratio": 0.5, "h2o_queries": 64},
    "h2o 0.25 by 64 queries": {"h2o_ratio": 0.25, "h2o_queries": 64},
    "h2o 0.5, int8": {"h2o_ratio": 0.5, "bits": 8},
    "h2o 0.5, int8, s_ratio 0.25": {"h2o_ratio": 0.5, "bits": 8, "s_ratio": 0.25},
    "h2o 0.5, int4": {"h2o_ratio": 0.5, "bits": 4},
}


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("-p", "--projections", required=True)
    parser.add_argument("--evaluation", required=True, help="text to evaluate on")
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--table", choices=("caches", "evictions"), action="append", help="only this one")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device")
    parser.add_argument("--json", help="write the rows here")
    options = parser.parse_args()

    model, tokenizer = aqua.load_model(options.model, dtype=options.dtype, device=options.device)
    ids, prefix = tokenize(tokenizer, aqua.load_text(options.evaluation))
    windows = token_windows(
        ids, tokens=options.windows * options.context, context=options.context, seed=None, prefix=prefix
    )
    projections = aqua.Projections.load(options.projections)
    tables = {"caches": CACHES, "evictions": EVICTIONS}
    tables = {name: tables[name] for name in options.table or tables}
    results = {}
    with Progress(console=Console(stderr=True)) as progress:
        for name, caches in tables.items():
            task = progress.add_task(name)
            settings = [
                Setting(aqua.AquaConfig(**OURS | {"k_ratio": ratio} | fields))
                for fields in caches.values()
                for ratio in RATIOS
            ]
            results[name] = evaluate_perplexity(
                Subject(options.model, model, tokenizer, projections),
                settings,
                windows,
                progress=lambda done, total, task=task: progress.update(task, completed=done, total=total),
            )
    if options.json:
        write_json(options.json, results)
    for result, caches in zip(results.values(), tables.values(), strict=True):
        print_table(result, caches)


def print_table(result, caches) -> None:
    """Markdown: a row a cache, a column a k_ratio."""
    dense = result["dense"]
    print(f"\ndense perplexity {dense['perplexity']:.2f}, {dense['tokens']} tokens scored ({result['scored']})\n")
    print("| cache | " + " | ".join(f"k_ratio {ratio:g}" for ratio in RATIOS) + " |")
    print("|---|" + "---|" * len(RATIOS))
    rows = iter(result["rows"])
    for name in caches:
        cells = [
            f"{row['perplexity_change']:+.2%} ({row['kl']:.4f}, {row['top1']:.1%})"
            for _, row in zip(RATIOS, rows, strict=False)
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
