#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What choosing tokens loses, by bytes read: AQUA-Select beside SparQ, Loki, DoubleSparse, Quest and oracles.

    python benchmarks/select_curves.py MODEL --projections svd=svd.safetensors --test wiki.txt --length 8192
    python benchmarks/select_curves.py MODEL --projections tuned=t.safetensors --test wiki.txt --length 8192 --ablate

All choose for the same queries of the same windows, with the same exact window (4 + 64), and attend exactly to what
they read. They differ in what scores the tokens. A row a method and budget: the share of the tokens and of the bytes
that is read, scores included, KL to dense attention, and the change of perplexity. "oracle" scores exactly, for free.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import aqua_attention as aqua
from aqua_attention.data.text import load_text, tokenize
from aqua_attention.evaluate.setting import Setting, Subject, first_windows
from aqua_attention.evaluate.suites.perplexity import DenseLogits, evaluate_perplexity
from aqua_attention.ops import tokens
from aqua_attention.ops.plan import LayerPlan
from aqua_attention.ops.tokens import Scored, products, scores_by_dimensions

PAGE = 16
SHARES = ({"select_p": 0.8}, {"select_p": 0.9}, {"select_p": 0.95}, {"select_p": 0.99})
COUNTS = (0.02, 0.05, 0.1, 0.2)
"""Of the tokens of a window, for methods with a fixed budget."""


def exactly(query: Tensor, key: Tensor, _: Tensor | None, plan: LayerPlan) -> Scored:
    """An oracle's scores."""
    return Scored(products(query, key), 0.0)


def by_loudest_channels(query: Tensor, key: Tensor, _: Tensor | None, plan: LayerPlan) -> Scored:
    """DoubleSparse: the channels whose products are largest on the calibration text, the same for all queries."""
    chosen = torch.zeros_like(plan.key_rms, dtype=torch.bool)
    chosen.scatter_(-1, CHANNELS[plan.index].to(query.device).topk(plan.k, -1).indices, True)
    rows = chosen.repeat_interleave(query.shape[1] // key.shape[1], 0)[None, :, None].expand(query.shape)
    return scores_by_dimensions(query, key, rows, plan)


CHANNELS: dict[int, Tensor] = {}
"""Of each layer: root mean squares of queries times those of keys, [num_key_value_heads, head_dim]."""


def paged(of_page: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Scored]:
    """Scores of whole pages: the tokens of one score the same, so that all of them are read or none."""

    def scores(query: Tensor, key: Tensor, _: Tensor | None, plan: LayerPlan) -> Scored:
        count = key.shape[2]
        rest = -count % PAGE
        # The last page is filled up with its last token.
        whole = torch.cat([key, key[:, :, -1:].expand(-1, -1, rest, -1)], 2).unflatten(2, (-1, PAGE))
        found = of_page(query, whole).repeat_interleave(PAGE, -1)[..., :count]
        return Scored(found, 2 * key.shape[-1] * 2 / PAGE)

    return scores


def most_possible(query: Tensor, pages: Tensor) -> Tensor:
    """Quest: the largest product that a key within a page's minimum and maximum could have."""
    return products(query.clamp_min(0), pages.amax(3)) + products(query.clamp_max(0), pages.amin(3))


def mean_and_deviation(query: Tensor, pages: Tensor) -> Tensor:
    """The product with a page's mean, and one standard deviation of it."""
    return products(query, pages.mean(3)) + products(query.square(), pages.var(3, correction=0)).sqrt()


@dataclass(frozen=True)
class Method:
    """One way to choose tokens.

    Attributes:
        basis: of the projections, see `Projections.with_basis`; or the name of a file.
        knobs: of the setting, besides the budget; scores: what scores tokens; left_out: see `tokens.LEFT_OUT`.
        fixed: its budget is a number of tokens, not a share of the softmax.
    """

    basis: str
    knobs: dict[str, Any]
    scores: Callable[..., Scored] = scores_by_dimensions
    left_out: str = "nothing"
    fixed: bool = False


def peers(dims: float) -> dict[str, Method]:
    """Others' methods, in as many dimensions as ours where they have dimensions."""
    of_query = {"k_ratio": dims, "selection": "magnitude"}
    static = {"k_ratio": dims, "selection": "static"}
    found = {
        "SparQ": Method("none", of_query, left_out="mean"),
        "Loki": Method("key-pca", static),
        "DoubleSparse": Method("none", static, by_loudest_channels),
        "Quest": Method("none", {}, paged(most_possible)),
        "pages, mean and deviation": Method("none", {}, paged(mean_and_deviation)),
        "oracle": Method("none", {}, exactly),
    }
    return found | {f"{name}, fixed": replace(method, fixed=True) for name, method in found.items()}


def ours(name: str, dims: float, bits: int) -> dict[str, Method]:
    """AQUA-Select with a file's rotations."""
    method = Method(name, {"k_ratio": dims, "score_bits": bits})
    return {f"AQUA ({name})": method, f"AQUA ({name}), fixed": replace(method, fixed=True)}


def ablations(name: str, dims: float, bits: int, head_dim: int) -> dict[str, Method]:
    """AQUA-Select with one choice changed at a time."""
    as_it_is = Method(name, {"k_ratio": dims, "score_bits": bits})

    def changed(**knobs: Any) -> Method:
        return replace(as_it_is, knobs=as_it_is.knobs | knobs)

    found = {"as it is": as_it_is}
    found |= {f"{few} dimensions": changed(k_ratio=few / head_dim) for few in (16, 32, 48, 64) if few < head_dim}
    found |= {f"{few} bits": changed(score_bits=few) for few in (16, 8, 4)}
    found |= {"magnitude": changed(selection="magnitude"), "static": changed(selection="static")}
    found |= {"dimensions by head": changed(share="head")}
    found |= {f"left out: {each}": replace(as_it_is, left_out=each) for each in ("mean", "others")}
    return found


@contextmanager
def measuring(method: Method) -> Iterator[None]:
    """While open, tokens are scored so."""
    before = tokens.SCORES, tokens.LEFT_OUT
    tokens.SCORES, tokens.LEFT_OUT = method.scores, method.left_out
    try:
        yield
    finally:
        tokens.SCORES, tokens.LEFT_OUT = before


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
    parser.add_argument("--method", action="append", help="only this one; may be repeated")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", help="write the rows here")
    given = parser.parse_args()
    model, tokenizer = aqua.load_model(given.model, dtype=given.dtype)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    files = [each.partition("=") for each in given.projections]
    bases = {name: aqua.Projections.load(file) for name, _, file in files}
    first = next(iter(bases.values()))
    bases |= {name: first.with_basis(name) for name in ("none", "key-pca")}
    plain = bases["none"].layers
    CHANNELS.update({index: layer.key_rms * layer.query_rms for index, layer in plain.items()})
    head_dim = next(iter(plain.values())).rotation.shape[-1]
    methods: dict[str, Method] = {}
    for name, _, _ in files:
        make = ablations if given.ablate else ours
        methods |= make(name, given.dims / head_dim, given.bits, *([head_dim] if given.ablate else []))
    methods |= {} if given.ablate else peers(given.dims / head_dim)
    if unknown := set(given.method or ()) - set(methods):
        parser.error(f"--method is {', '.join(unknown)}: choose from {', '.join(methods)}")
    rows = []
    for length in given.length:
        for text in given.test:
            subject = Subject("", model, tokenizer, first, text=load_text(text))
            windows = first_windows(model, tokenize(tokenizer, subject.text), max(given.tokens, length), length)
            kept = DenseLogits()
            for name in given.method or methods:
                method = methods[name]
                counts = ({"select_tokens": math.ceil(share * length)} for share in COUNTS)
                budgets = list(counts) if method.fixed else SHARES
                settings = [Setting(aqua.AquaConfig(**method.knobs | budget)) for budget in budgets]
                of = replace(subject, projections=bases[method.basis])
                with measuring(method):
                    found = evaluate_perplexity(of, settings, windows, dense_logits=kept)["rows"]
                for budget, row in zip(budgets, found, strict=True):
                    shares = {each: row[each] for each in ("tokens_read", "bytes_read", "kl", "perplexity_change")}
                    layers = {"tokens_read_per_layer": row["tokens_read_per_layer"]}
                    rows.append({"text": text, "length": length, "method": name} | budget | shares | layers)
                    said = ", ".join(f"{each} {value:g}" for each, value in budget.items())
                    print(
                        f"{text} {length} {name}, {said}: {row['tokens_read']:.1%} of the tokens, "
                        f"{row['bytes_read']:.1%} of the bytes, KL {row['kl']:.4f}, "
                        f"perplexity {row['perplexity_change']:+.2%}",
                        flush=True,
                    )
    if given.json:
        Path(given.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
