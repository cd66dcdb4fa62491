#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How many tokens a query would read if approximate scores chose them, by the rotation that the scores are made of.

    python benchmarks/tokens_read.py MODEL --test wiki.txt --length 8192 --share 0.95 --share 0.96 \\
        --projections svd=svd.safetensors --projections tuned=tuned.safetensors

A query scores all tokens with a few of the rotated dimensions, chosen for it with weights. It reads the fewest tokens
whose approximate softmax, mean over the heads of its group, sums to p; those of the exact window (4 + 64) are scored
exactly, and always read. "oracle" scores with every dimension. Queries lie in the second half of each window. A row a
p and basis: the share of the tokens seen that is read, and the exact softmax that they hold. A worse basis reads fewer
tokens for the same p, and these hold less: compare rows that hold the same.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor, nn

import aqua_attention as aqua
from aqua_attention.data.text import load_text, tokenize
from aqua_attention.evaluate.setting import first_windows
from aqua_attention.model.capture import attention_layers, observe_windows
from aqua_attention.ops.plan import LayerPlan
from aqua_attention.ops.select import rotate, select_dimensions

SINK, RECENT = 4, 64
QUERIES = 128
"""Of a window and layer, at places spread over its second half."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--test", required=True, help="a text")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a window")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens tested")
    parser.add_argument("--projections", action="append", required=True, help="NAME=FILE; may be repeated")
    parser.add_argument("--dims", type=int, default=32, help="dimensions that score")
    parser.add_argument("--share", type=float, action="append", help="p, the share of the softmax that is read (0.95)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", help="write the rows here")
    given = parser.parse_args()
    shares = given.share or [0.95]
    model, tokenizer = aqua.load_model(given.model, dtype=given.dtype)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    windows = first_windows(model, tokenize(tokenizer, load_text(given.test)), given.tokens, given.length)
    files = [each.partition("=") for each in given.projections]
    bases = {name: aqua.Projections.load(file) for name, _, file in files}
    layers = attention_layers(model)
    found: dict[tuple[float, str], list[Tensor]] = defaultdict(list)

    def measure(module: nn.Module, query: Tensor, key: Tensor, scaling: float) -> None:
        index = next(layer.index for layer in layers if layer.module is module)
        places = torch.linspace(key.shape[2] // 2, key.shape[2] - 1, QUERIES, device=key.device).long()
        token = torch.arange(key.shape[2], device=key.device)
        visible = token <= places[:, None]
        exact = visible & ((token < SINK) | (token > places[:, None] - RECENT))
        query, key = query[:, :, places].float(), key.float()
        scores = products(query, key).masked_fill(~visible, -torch.inf) * scaling
        approximate = {"oracle": scores}
        for name, projections in bases.items():
            layer = projections.layers[index]
            rotation, spread = layer.rotation.to(key.device), layer.key_spread.to(key.device)
            config = aqua.AquaConfig(k_ratio=given.dims / key.shape[-1], sink=SINK, recent=RECENT, min_length=0)
            turned = rotate(query, rotation)
            selected = select_dimensions(turned, LayerPlan.of(rotation, spread, config))
            turned = turned if selected is None else torch.where(selected, turned, 0)
            few = products(turned, rotate(key, rotation)).masked_fill(~visible, -torch.inf) * scaling
            approximate[name] = torch.where(exact, scores, few)
        for share in shares:
            for name, each in approximate.items():
                found[share, name].append(read(scores, each, exact, share))

    observe_windows(model, layers, windows, measure, None)
    rows = []
    for (share, name), each in sorted(found.items(), key=lambda item: item[0][0]):
        tokens, held = torch.stack(each).mean((0, 2)).tolist()
        by_layer = torch.stack(each).unflatten(0, (-1, len(layers)))[:, :, 0].mean((0, 2)).tolist()
        rows.append({"p": share, "basis": name, "tokens_read": tokens, "softmax_held": held, "by_layer": by_layer})
        print(f"p {share:g}, {name}: {tokens:.1%} of the tokens, which hold {held:.1%} of the softmax", flush=True)
    if given.json:
        Path(given.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")


def products(query: Tensor, key: Tensor) -> Tensor:
    """[num_key_value_heads, group, queries, keys] of one sequence."""
    grouped = query[0].unflatten(0, (key.shape[1], -1))
    return grouped @ key[0][:, None].transpose(-1, -2)


def read(scores: Tensor, approximate: Tensor, exact: Tensor, share: float) -> Tensor:
    """Share of the tokens seen that is read, and of the softmax that they hold, [2, num_key_value_heads]."""
    weight = approximate.softmax(-1).mean(1)
    # What is always read comes first, then the heaviest.
    order = (weight + 2 * exact).sort(-1, descending=True)
    before = weight.gather(-1, order.indices).cumsum(-1) - weight.gather(-1, order.indices)
    taken = torch.zeros_like(weight, dtype=torch.bool).scatter(-1, order.indices, before < share) | exact
    seen = scores[:, 0].isfinite().sum(-1)
    tokens = (taken.sum(-1) / seen).mean(-1)
    held = (scores.softmax(-1).mean(1) * taken).sum(-1).mean(-1)
    return torch.stack([tokens, held])


if __name__ == "__main__":
    main()
