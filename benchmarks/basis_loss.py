#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What the rotation is worth: KL to dense attention without one, with singular vectors, and of files.

    aqua calibrate MODEL --data CALIBRATION --basis tuned --positions 0:8192 -o tuned.safetensors
    python benchmarks/basis_loss.py MODEL --data CALIBRATION --last-position 8192 --test wiki.txt --test code.txt \\
        --length 2048 --length 8192 --projections tuned=tuned.safetensors

Singular vectors are calibrated on windows of 2048 tokens; with "positions" half of these begin later; "at this length"
reads windows as long as those tested. Settings: weighted, exact 4 + 64. A row a text, length and setting; in brackets:
to "svd, at this length".
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch

import aqua_attention as aqua
from aqua_attention.calibration.positions import begins, placed
from aqua_attention.calibration.run import CalibrationRun
from aqua_attention.data.text import load_text, token_windows, tokenize
from aqua_attention.evaluate.setting import Setting, Subject, first_windows
from aqua_attention.evaluate.suites.perplexity import DenseLogits, evaluate_perplexity
from aqua_attention.model.sides import TEXT

SETTINGS = {
    "0.5 group": {"k_ratio": 0.5},
    "0.25 group": {"k_ratio": 0.25},
    "0.75 group": {"k_ratio": 0.75},
    "0.5 head": {"k_ratio": 0.5, "share": "head"},
}
STORED = {
    "0.5, s_ratio 0.25": {"k_ratio": 0.5, "s_ratio": 0.25},
    "0.5, int8": {"k_ratio": 0.5, "bits": 8},
    "0.5, int4": {"k_ratio": 0.5, "bits": 4},
}


def main() -> None:
    """Calibrate, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="calibration text")
    parser.add_argument("--test", action="append", required=True, help="a text to test on; may be repeated")
    parser.add_argument("--length", type=int, action="append", required=True, help="tokens of a tested window")
    parser.add_argument("--tokens", type=int, default=20480, help="tokens tested a text and length")
    parser.add_argument("--svd-tokens", type=int, default=98304, help="calibration tokens of the singular vectors")
    parser.add_argument("--last-position", type=int, help="windows are read at positions up to this")
    parser.add_argument("--first-length-only", action="store_true", help="texts but the first at the first length only")
    parser.add_argument("--projections", action="append", default=[], help="NAME=FILE to measure; may be repeated")
    parser.add_argument("--stored", action="store_true", help="settings that store less, too")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", help="write the rows here")
    given = parser.parse_args()
    model, tokenizer = aqua.load_model(given.model, dtype=given.dtype)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    ids, prefix = tokenize(tokenizer, load_text(given.data))

    def windows(context: int) -> torch.Tensor:
        return token_windows(ids, tokens=given.svd_tokens, context=context, seed=0, prefix=prefix)

    def svd(inputs) -> aqua.Projections:
        return CalibrationRun(model, progress=False).learn(inputs, {TEXT}, {})

    short, start = windows(2048), time.perf_counter()
    bases = {"svd": svd(short)}
    bases["none"] = bases["svd"]
    if given.last_position:
        places = begins(model, len(short), context=2048, last=given.last_position)
        bases["svd, positions"] = svd([placed(*each) for each in zip(short, places, strict=True)])
    print(f"singular vectors: {time.perf_counter() - start:.0f} s", flush=True)
    bases |= {
        name: aqua.Projections.load(file) for name, _, file in (each.partition("=") for each in given.projections)
    }
    rows = []
    for length in given.length:
        own = svd(windows(length)) if length != 2048 else bases["svd"]
        for text in given.test[: 1 if given.first_length_only and length != given.length[0] else None]:
            subject = Subject("", model, tokenizer, own, text=load_text(text))
            tested = first_windows(model, tokenize(tokenizer, subject.text), max(given.tokens, length), length)
            kept = DenseLogits()
            wanted = SETTINGS | (STORED if given.stored else {})
            named = {"svd, at this length": own} | bases
            found = {}
            for name, projections in named.items():
                of, basis = replace(subject, projections=projections), "none" if name == "none" else "aqua"
                settings = [Setting(aqua.AquaConfig(**each), basis) for each in wanted.values()]
                found[name] = evaluate_perplexity(of, settings, tested, dense_logits=kept)["rows"]
            for place, setting in enumerate(wanted):
                first = found["svd, at this length"][place]["kl"]
                cells = {name: each[place] for name, each in found.items()}
                said = ", ".join(f"{name} {row['kl']:.4f} ({row['kl'] / first:.2f})" for name, row in cells.items())
                print(f"{text} {length} {setting}: {said}", flush=True)
                figures = {name: [row["kl"], row["perplexity_change"]] for name, row in cells.items()}
                rows.append({"text": text, "length": length, "setting": setting, "kl, change": figures})
    if given.json:
        Path(given.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
