# SPDX-License-Identifier: Apache-2.0
"""A decoding step that chooses tokens, cut into parts that overlap: does it hide the time that choosing takes?

Scoring and attending wait for the GPU's memory, and choosing hardly reads any. So sequences are taken in parts, each on
a stream of its own: a part is scored while the one before it chooses, and attends while the next one does. This is an
experiment: steps of the library have one part.

Each time is of one layer in a CUDA graph over so many layers that none finds its keys in the GPU's cache. Before a
number of parts is timed its answers are compared with those of one part.

python benchmarks/select_overlap.py --size 32x32768 --parts 2 --parts 4
"""

from __future__ import annotations

import argparse

import torch
from select_decode import (
    DIM,
    DTYPE,
    HEADS,
    KV_HEADS,
    LEAST_BYTES,
    MOST_LAYERS,
    RECENT,
    ROOM,
    SCALING,
    SCORED,
    SINK,
    TOLERANCE,
    filled,
    part,
)

from aqua_attention.bench.timing import seconds_of
from aqua_attention.config import AquaConfig
from aqua_attention.io.files import write_json
from aqua_attention.ops.backends.triton import blocks
from aqua_attention.ops.backends.triton.token_choice import choose_tokens
from aqua_attention.ops.backends.triton.token_gather import attend_to_tokens
from aqua_attention.ops.backends.triton.token_prepare import prepare_tokens
from aqua_attention.ops.backends.triton.token_scores import score_tokens
from aqua_attention.ops.backends.triton.token_step import selected_step
from aqua_attention.ops.backends.triton.token_work import TokenWork
from aqua_attention.ops.plan import LayerPlan
from aqua_attention.report.tables import markdown


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="32x32768", help="sequences x tokens")
    parser.add_argument("--share", action="append", type=float, help="of tokens that are read; repeat for several")
    parser.add_argument("--parts", action="append", type=int, help="of the sequences; repeat for several")
    parser.add_argument("--bits", type=int, choices=[8], help="of keys and values; default: 16")
    parser.add_argument("--score-bits", type=int, choices=[8, 4], default=8, help="of the copy that is scored")
    parser.add_argument("--json", help="write all figures here")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this measures a CUDA GPU: there is none")
    batch, length = map(int, given.size.split("x"))
    rows = []
    for share in given.share or [0.06, 0.1, 0.24]:
        torch.cuda.empty_cache()
        rows += measure(batch, length, share, given.parts or [2, 4], given.bits, given.score_bits)
    cells = [[f"{each['share']:.0%}", str(each["parts"]), f"{1e6 * each['seconds']:.1f}"] for each in rows]
    print(f"{torch.cuda.get_device_name()}, {given.size}\n\n" + markdown(["read", "parts", "us"], cells))
    if given.json:
        write_json(given.json, {"device": torch.cuda.get_device_name(), "size": given.size, "results": rows})


def measure(batch, length, share, numbers, bits, score_bits):
    """Seconds of a layer in one part, in one without early starts, and in several."""
    torch.manual_seed(0)
    window = {"sink": SINK, "recent": RECENT, "score_bits": score_bits, "select_tokens": round(share * length)}
    config = AquaConfig(k_ratio=SCORED / DIM, **window)
    rotation = torch.linalg.qr(torch.randn(KV_HEADS, DIM, DIM, device="cuda")).Q.contiguous()
    ones = torch.ones(KV_HEADS, DIM, device="cuda")
    plan = LayerPlan(rotation, ones, config, SCALING, key_scale=ones, key_mean=torch.zeros_like(ones))
    layers = max(1, min(MOST_LAYERS, LEAST_BYTES // (4 * batch * length * KV_HEADS * DIM) + 1))
    caches = [filled(batch, length, plan, None, bits) for _ in range(layers)]
    states = [torch.randn(batch, n, DIM, dtype=DTYPE, device="cuda") for n in (HEADS, KV_HEADS, KV_HEADS)]
    found, expected = [], torch.empty(batch, HEADS, DIM, dtype=DTYPE, device="cuda")

    def reset():
        for cache in caches:
            cache.lengths.fill_(length - ROOM)

    work = TokenWork.of(caches[0], HEADS, plan.k)

    def whole():
        for cache in caches:
            selected_step(*states, cache, plan, work, expected, scaling=SCALING)

    for early in (True, False):
        blocks.EARLY_STARTS = early
        found.append(
            {"share": share, "parts": "1" if early else "1, no early start", "seconds": seconds_of(whole, reset)}
        )
    for number in numbers:
        output = torch.empty_like(expected)
        cuts = [slice(place * batch // number, (place + 1) * batch // number) for place in range(number)]
        parts = [
            Part(cut, [part(cache, cut) for cache in caches], [each[cut] for each in states], output[cut], plan)
            for cut in cuts
        ]

        def apart(parts=parts):
            for layer in range(layers):
                overlapped(parts, layer)

        reset()
        apart()
        reset()
        whole()
        if (output.float() - expected.float()).norm() > TOLERANCE * expected.float().norm():
            raise SystemExit(f"answers of {number} parts differ from those of one: nothing is measured")
        found.append({"share": share, "parts": number, "seconds": seconds_of(apart, reset)})
    return [each | {"seconds": each["seconds"] / layers} for each in found]


class Part:
    """Some sequences, what a step of theirs works in, and a stream of their own."""

    def __init__(self, rows, caches, states, output, plan):
        """Of all layers."""
        self.caches, self.states, self.output, self.plan = caches, states, output, plan
        self.work, self.stream = TokenWork.of(caches[0], HEADS, plan.k), torch.cuda.Stream()

    def prepare_and_score(self, layer):
        """Up to where memory is free for the next part."""
        prepare_tokens(*self.states, self.caches[layer], self.plan, self.work)
        window = self.plan.sink, self.plan.recent
        score_tokens(self.caches[layer], self.work, scaling=SCALING, window=window, appended=True)

    def choose_and_attend(self, layer):
        """The rest."""
        choose_tokens(self.caches[layer], self.work, self.plan, appended=True)
        attend_to_tokens(self.caches[layer], self.work, self.output, scaling=SCALING, appended=True)


def overlapped(parts, layer):
    """One step of a layer: parts are scored one after the other."""
    current, scored = torch.cuda.current_stream(), None
    for each in parts:
        each.stream.wait_stream(current)
        with torch.cuda.stream(each.stream):
            if scored is not None:
                each.stream.wait_event(scored)
            each.prepare_and_score(layer)
            scored = each.stream.record_event()
            each.choose_and_attend(layer)
    for each in parts:
        current.wait_stream(each.stream)


if __name__ == "__main__":
    main()
