#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Say which loss you accept, and get the cheapest setting that keeps to it.

    python examples/choose_setting.py --most 0.5%
    python examples/choose_setting.py --most 2% --model MODEL -p model.safetensors --data test.txt --length 8192

A small grid of settings is measured on a text. "Cheapest" is the one that reads the fewest bytes of keys and values for
a new token on this machine, and among equals the one that multiplies least. Choose on text like yours.
"""

import argparse
import sys
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console

import aqua_attention as aqua
from aqua_attention.cli.terminal import print_table
from aqua_attention.evaluate.setting import Setting, Subject
from aqua_attention.evaluate.suites.perplexity import evaluate_perplexity
from aqua_attention.io.progress import progress_bar

K_RATIOS = (1.0, 0.9, 0.75, 0.5)
BITS = (None, 8)
CONSOLE = Console(highlight=False, soft_wrap=True)


def share(text: str) -> float:
    """ "0.5%" as 0.005; the sign is asked for, so that nobody has to guess what 0.5 means."""
    try:
        number = float(text.removesuffix("%")) / 100
    except ValueError:
        number = -1.0
    if not text.endswith("%") or not 0 <= number < 1:
        raise aqua.AquaError(f"most is {text!r}: give per cent, with the sign, such as 0.5%")
    return number


def projections_of(model: Any, tokenizer: Any, file: Path, tokens: int) -> aqua.Projections:
    """Those of the file, which is made first where there is none."""
    if file.exists():
        return aqua.Projections.load(file)
    text = aqua.load_text("builtin:calibration")
    with progress_bar("calibrate") as progress:
        projections = aqua.calibrate(model, tokenizer, text, tokens=tokens, progress=progress)
    projections.save(file)
    return projections


def bytes_read(model: Any, projections: aqua.Projections, config: aqua.AquaConfig, length: int) -> tuple[float, str]:
    """Bytes of keys and values that decoding a token reads here after so many, to dense; and why it is not faster."""
    with aqua.apply(model, projections, config) as attachment:
        found = attachment.explain(length=length)
    assert found.decoding is not None  # an encoder, which decodes nothing, predicts no next token, and was refused
    why = ": ".join(filter(None, (found.reason, found.remedy)))
    return found.decoding.bytes.step / found.decoding.bytes.dense_step, why


def main() -> None:
    """Measure the grid, print it, and name the cheapest setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", required=True, help="perplexity you accept to lose, such as 0.5%%")
    parser.add_argument("--data", default="builtin:evaluation", help="text to measure on (%(default)s)")
    parser.add_argument("--tokens", type=int, default=4096, help="how much of it (%(default)s)")
    parser.add_argument("--context", type=int, default=1024, help="tokens in a window (%(default)s)")
    parser.add_argument("--length", type=int, default=4096, help="tokens in the cache that bytes are for (%(default)s)")
    parser.add_argument("--k-ratio", type=float, action="append", help="may be repeated (default: 1 0.9 0.75 0.5)")
    parser.add_argument("--model", default="smollm2", help="a folder, a .gguf file or a hub id (%(default)s)")
    parser.add_argument("-p", "--projections", type=Path, default=Path("smollm2.safetensors"), help="made if missing")
    parser.add_argument("--calibration-tokens", type=int, default=16384, help="read to make them (%(default)s)")
    given = parser.parse_args()
    most = share(given.most)
    text = aqua.load_text(given.data)
    model, tokenizer = aqua.load_model(given.model)
    projections = projections_of(model, tokenizer, given.projections, given.calibration_tokens)
    combinations = product(given.k_ratio or K_RATIOS, BITS)
    # k_ratio 1 in full precision is dense attention.
    configs = [aqua.AquaConfig(k_ratio=ratio, bits=bits) for ratio, bits in combinations if ratio < 1 or bits]
    settings = [Setting(config) for config in configs]
    subject = Subject(given.model, model, tokenizer, projections, given.data, text)
    windows = subject.windows(given.tokens, given.context)
    with progress_bar("measure") as progress:
        result = evaluate_perplexity(subject, settings, windows, progress=progress)

    titles = ["setting", "perplexity", "change", "KL to dense", "bytes read", "products", ""]
    table, found = [["dense", f"{result['dense']['perplexity']:.3f}", "", "", "100%", "100%", ""]], []
    for setting, row in zip(settings, result["rows"], strict=True):
        read, why = bytes_read(model, projections, setting.config, given.length)
        words = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in setting.config.changes.items())
        keeps = row["perplexity_change"] <= most
        found += [(read, row["mean_k"], words or "the default", why)] * keeps
        figures = f"{row['perplexity']:.3f}", f"{row['perplexity_change']:+.2%}", f"{row['kl']:.4f}"
        shares = f"{read:.0%}", f"{row['mean_k']:.0%}"
        table.append([words or "the default", *figures, *shares, "" if keeps else "too much"])
    print_table((titles, table))
    CONSOLE.print(f"{result['dense']['tokens']} predictions; bytes read after {given.length} tokens, to dense.")
    if not found:
        raise aqua.AquaError(
            f"no setting of the grid keeps to {most:.2%}: allow more, or calibrate with --basis learned"
        )
    *_, words, why = min(found)
    CONSOLE.print(f"[b]Cheapest within {most:.2%}: {words}[/b]")
    if why:
        CONSOLE.print(f"It could be faster here, but {why}.", markup=False)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (aqua.AquaError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
