#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Which share of the tokens `select_p` reads of a real text, by layer and key-value head.

    python benchmarks/select_shares.py MODEL -p FILE --test wiki.txt --length 8192 --length 32768 --json shares.json

Windows of each length are read with the setting of the preset "select"; the last 128 queries of each are counted, which
see nearly the whole window, as decoding steps do. `benchmarks/select_decode.py --shares shares.json` times steps whose
heads read such shares. Long windows need a GPU, or patience.
"""

import argparse
import shlex
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import aqua_attention as aqua
from aqua_attention.data.text import load_text, text_digest, tokenize
from aqua_attention.errors import AquaError
from aqua_attention.evaluate.record import now, provenance, write_result
from aqua_attention.evaluate.run import facts_of_model
from aqua_attention.evaluate.setting import first_windows
from aqua_attention.model.capture import attention_layers, run_encoder_or_decoder
from aqua_attention.ops.plan import Reading
from aqua_attention.report.tables import markdown

QUERIES = 128
"""The last ones of a window."""


def shares_read(
    model: PreTrainedModel, projections: aqua.Projections, config: aqua.AquaConfig, windows: Tensor
) -> list[dict[str, Any]]:
    """Mean shares over the windows [count, length] and the last queries of each.

    Returns:
        A row a layer that chooses tokens: `layer` (its index) and `shares`, one for each key-value head.

    Raises:
        AquaError: no layer chooses tokens.
    """
    found: dict[int, list[Tensor]] = defaultdict(list)

    def count(layer: int, reading: Reading) -> None:
        read, seen = (each[0, :, -QUERIES:].double() for each in reading[:2])
        found[layer].append((read / seen).mean(-1))

    layers = attention_layers(model)
    with aqua.apply(model, projections, config) as attachment, torch.no_grad():
        attachment.on_reading = count
        for window in windows:
            run_encoder_or_decoder(model, layers, {"input_ids": window[None]})
    if not found:
        raise AquaError(f"no layer of {type(model).__name__} chooses tokens: give a model with full attention")
    return [{"layer": layer, "shares": torch.stack(each).mean(0).tolist()} for layer, each in sorted(found.items())]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-p", "--projections", type=Path, required=True)
    parser.add_argument("--test", required=True, help="a text")
    parser.add_argument("--length", type=int, action="append", help="tokens of a window; may be repeated (8192)")
    parser.add_argument("--windows", type=int, default=2, help="of each length (%(default)s)")
    parser.add_argument("--select-p", type=float, default=0.95, help="share of the softmax that is read (%(default)s)")
    parser.add_argument("--k-ratio", type=float, default=0.25, help="of the dimensions, which score (%(default)s)")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", type=Path, help="write the shares here, with how they were made")
    given, started = parser.parse_args(), now()
    model, tokenizer = aqua.load_model(given.model, dtype=given.dtype)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    projections, text = aqua.Projections.load(given.projections), load_text(given.test)
    config = aqua.AquaConfig.preset("select", select_p=given.select_p, k_ratio=given.k_ratio)
    tokens, results = tokenize(tokenizer, text), []
    head = {"model": given.model, "dtype": str(model.dtype).removeprefix("torch."), "setting": config.to_dict()}
    head |= {"data": given.test, "text_sha256": text_digest(text), "queries": QUERIES}
    head |= provenance(given.projections, projections) | facts_of_model(model)
    for length in given.length or [8192]:
        windows = first_windows(model, tokens, given.windows * length, length)
        rows = shares_read(model, projections, config, windows)
        mean = sum(sum(row["shares"]) / len(row["shares"]) for row in rows) / len(rows)
        results.append({"length": length, "windows": len(windows), "mean": mean, "layers": rows})
        cells = [[str(row["layer"]), *(f"{share:.1%}" for share in row["shares"])] for row in rows]
        heads = [f"head {index}" for index in range(len(rows[0]["shares"]))]
        print(f"{length} tokens, {config.choice}: {mean:.1%} are read\n")
        print(markdown(["layer", *heads], cells), flush=True)
        if given.json:
            write_result(given.json, None, head | {"results": results}, shlex.join(sys.argv), started)


if __name__ == "__main__":
    try:
        main()
    except AquaError as error:
        sys.exit(f"error: {error}")
