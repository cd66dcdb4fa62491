#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What choosing tokens loses, by bytes read: AQUA-Select beside SparQ, Loki, DoubleSparse, Quest and oracles.

    python benchmarks/select_curves.py MODEL --projections svd=svd.safetensors --test wiki.txt --length 8192
    python benchmarks/select_curves.py MODEL --projections tuned=t.safetensors --test wiki.txt --length 8192 --ablate

All choose for the same queries of the same windows, with the same exact window (4 + 64), and attend exactly to what
they read. They differ in what scores the tokens. A row a method and budget: the share of the tokens and of the bytes
that is read, scores included, KL to dense attention, and the change of perplexity. "oracle" scores exactly, for free.

Each row also says which share of the exact softmax the chosen tokens hold, in all and by layer, and what the scores
make of it. Only plain torch knows that; with --no-mass AQUA and Loki run by kernels on a GPU. With --json every row is
kept as soon as it is measured, and a second run goes on behind the last one.

Logits of 32k tokens of a model of 152k words take 20 GB in float32, and torch's dense attention in float32 forms all
scores: use bfloat16 there. Set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True: blocks of queries see more and more
keys.
"""

import argparse
import json
import math
import shlex
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from select_methods import CHANNELS, Method, ablations, measuring, ours, p_by_layer, peers
from torch import Tensor

import aqua_attention as aqua
from aqua_attention.data.text import load_text, text_digest, tokenize
from aqua_attention.evaluate.record import file_digest, now, provenance, write_result
from aqua_attention.evaluate.run import facts_of_model
from aqua_attention.evaluate.setting import Setting, Subject, first_windows
from aqua_attention.evaluate.suites.perplexity import DenseLogits, evaluate_perplexity
from aqua_attention.ops import reference
from aqua_attention.ops.tokens import Way

SHARES = ({"select_p": 0.8}, {"select_p": 0.9}, {"select_p": 0.95}, {"select_p": 0.99})
COUNTS = (0.02, 0.05, 0.1, 0.2)
"""Of the tokens of a window, for methods with a fixed budget."""
FIGURES = ("tokens_read", "bytes_read", "kl", "perplexity", "perplexity_change", "top1")
LAYERS = ("tokens_read_per_layer", "bytes_read_per_layer")
GPU_CHUNKS = 64
"""Scores of a block of queries, see `ops.reference`: half a gigabyte, of which about ten copies are in flight."""
GPU_LOGITS = 24 << 30
"""Dense logits kept on a GPU: one window of 32k tokens and 152k words in float32, beside as much of a setting's."""


@dataclass
class Curves:
    """The rows so far, in their file.

    Attributes:
        head: what is true of all; results: those of each text and length, as the file holds them.
    """

    path: Path | None
    head: dict[str, Any]
    started: str
    results: list[dict[str, Any]]

    @classmethod
    def of(cls, path: Path | None, head: dict[str, Any]) -> "Curves":
        """With what the file has already; a ValueError where it is of something else."""
        if path is None or not path.exists():
            return cls(path, head, now(), [])
        value = json.loads(path.read_text(encoding="utf-8"))
        if other := [name for name in ("model", "dtype", "files") if value.get(name) != head[name]]:
            raise ValueError(f"{path} has another {', '.join(other)}: give another file")
        return cls(path, head, value["started"], value["results"])

    def of_text(self, **same: Any) -> list[dict[str, Any]]:
        """The rows of one text and length, to be added to."""
        for result in self.results:
            if all(result[name] == value for name, value in same.items()):
                return result["rows"]
        self.results.append(same | {"rows": []})
        return self.results[-1]["rows"]

    def write(self) -> None:
        """Keep all rows."""
        if self.path is not None:
            write_result(self.path, "select", self.head | {"results": self.results}, shlex.join(sys.argv), self.started)


def measured(
    subject: Subject, method: Method, budget: dict[str, Any], windows: Tensor, dense: DenseLogits, watched: bool = True
) -> Any:
    """One row."""
    started = time.perf_counter()
    setting = Setting(aqua.AquaConfig(**method.knobs | budget))
    with measuring(method.way, watched) as masses:
        row = evaluate_perplexity(subject, [setting], windows, dense_logits=dense)["rows"][0]
    figures = {name: row[name] for name in (*FIGURES, *LAYERS)} | masses.figures()
    return budget | figures | {"setting": row["setting"], "seconds": round(time.perf_counter() - started, 2)}


def said(row: dict[str, Any], budget: dict[str, Any]) -> str:
    """A row in words."""
    asked = ", ".join(f"{each} {value:g}" for each, value in budget.items())
    found = (
        f"{row['method']}, {asked}: {row['tokens_read']:.1%} of the tokens, {row['bytes_read']:.1%} of the bytes, "
        f"KL {row['kl']:.4f}, perplexity {row['perplexity_change']:+.2%}; "
    )
    if "mass" in row:
        decided = "" if row["mass_decided"] is None else f", {row['mass_decided']:.4f} where p decides"
        found += f"they hold {row['mass']:.4f} of the softmax (by the scores {row['mass_expected']:.4f}{decided}); "
    return found + f"{row['seconds']:.0f} s"


def dense_logits(windows: Tensor, model: Any) -> DenseLogits:
    """On a GPU where all fit there, since taking them back takes longer than computing them; else in memory."""
    words = (model.lm_head if hasattr(model, "lm_head") else model.get_output_embeddings()).weight
    needed = windows.numel() * words.shape[0] * words.element_size()
    if words.device.type == "cpu" or needed > GPU_LOGITS:
        return DenseLogits()
    return DenseLogits(GPU_LOGITS, str(words.device))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--projections", action="append", required=True, help="NAME=FILE; may be repeated")
    parser.add_argument("--test", action="append", required=True, help="a text; may be repeated")
    parser.add_argument(
        "--length", type=int, action="append", required=True, help="tokens of a window; may be repeated"
    )
    parser.add_argument("--tokens", type=int, default=16384, help="tokens tested a text and length")
    parser.add_argument("--dims", type=int, default=32, help="dimensions that score")
    parser.add_argument("--bits", type=int, default=8, help="their bits, of AQUA")
    parser.add_argument("--ablate", action="store_true", help="AQUA with one choice changed at a time, not the peers")
    parser.add_argument("--correct", help="a text, no tested one: with --ablate, also p by layer, found on its start")
    parser.add_argument("--no-mass", action="store_true", help="do not ask which share of the softmax tokens hold")
    parser.add_argument("--method", action="append", help="only this one; may be repeated")
    parser.add_argument("--p", type=float, action="append", help="only this select_p; may be repeated")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path, help="keep the rows here; rows that it has are not measured again")
    given = parser.parse_args()
    model, tokenizer = aqua.load_model(given.model, dtype=given.dtype)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    reference.GPU_CHUNKS = GPU_CHUNKS
    files = {name: Path(file) for name, _, file in (each.partition("=") for each in given.projections)}
    bases = {name: aqua.Projections.load(file) for name, file in files.items()}
    first = next(iter(bases.values()))
    bases |= {name: first.with_basis(name) for name in ("none", "key-pca")}
    plain = bases["none"].layers
    CHANNELS.update({index: layer.key_rms * layer.query_rms for index, layer in plain.items()})
    head_dim = next(iter(plain.values())).rotation.shape[-1]
    methods: dict[str, Method] = {}
    for name in files:
        if given.ablate:
            made = ablations(name, given.dims / head_dim, given.bits, head_dim)
            made |= {"p by layer": made["as it is"]} if given.correct else {}
            methods |= made if len(files) == 1 else {f"{each} ({name})": method for each, method in made.items()}
        else:
            methods |= ours(name, given.dims / head_dim, given.bits)
    methods |= {} if given.ablate else peers(given.dims / head_dim)
    if unknown := set(given.method or ()) - set(methods):
        parser.error(f"--method is {', '.join(unknown)}: choose from {', '.join(methods)}")
    rests_on = provenance(next(iter(files.values())), first)
    del rests_on["basis"]
    head = {"model": given.model, "dtype": given.dtype, "files": {n: file_digest(f) for n, f in files.items()}}
    try:
        curves = Curves.of(given.json, head | rests_on | facts_of_model(model))
    except ValueError as error:
        parser.error(str(error))
    shares = [{"select_p": p} for p in given.p] if given.p else SHARES

    def windows_of(text: str, tokens: int, length: int) -> Tensor:
        return first_windows(model, tokenize(tokenizer, text), tokens, length)

    for length in given.length:
        corrected: dict[str, Way] = {}
        for name in given.test:
            text = load_text(name)
            subject = Subject("", model, tokenizer, first, text=text)
            windows = windows_of(text, max(given.tokens, length), length)
            rows = curves.of_text(data=name, context=length, tokens=windows.numel(), text_sha256=text_digest(text))
            dense = dense_logits(windows, model)
            for title in given.method or methods:
                method = methods[title]
                counts = [{"select_tokens": math.ceil(share * length)} for share in COUNTS]
                of = replace(subject, projections=bases[method.basis])
                for budget in counts if method.fixed else shares:
                    wanted = {"method": title} | budget
                    if any(wanted.items() <= row.items() for row in rows):
                        continue
                    if title.startswith("p by layer"):
                        if title not in corrected:
                            calibration = windows_of(load_text(given.correct), length, length)
                            corrected[title] = found_p(of, method, calibration)
                        method = replace(method, way=corrected[title])
                    rows.append(wanted | measured(of, method, budget, windows, dense, not given.no_mass))
                    print(f"{name} {length} {said(rows[-1], budget)}", flush=True)
                    curves.write()


def found_p(subject: Subject, method: Method, windows: Tensor) -> Way:
    """The way in which each layer asks for a p of its own, found on these windows."""
    dense, found = dense_logits(windows, subject.model), {}
    for budget in SHARES:
        row = measured(subject, method, budget, windows, dense)
        found[budget["select_p"]] = row["mass_per_layer"]
    return p_by_layer(found)


if __name__ == "__main__":
    main()
