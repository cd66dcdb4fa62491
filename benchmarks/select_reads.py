# SPDX-License-Identifier: Apache-2.0
"""What a step that chooses tokens could take at best: kernels that only move the bytes that it must move.

Scoring reads a few dimensions, each a run of 128 bytes, of every tile of codes, and writes a weight of 16 bits for each
query head. Attending reads whole keys and values of tokens here and there. What these lose to reading in a row,
arithmetic is not to blame for.

python benchmarks/select_reads.py --json select_reads.json
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
import triton
import triton.language as tl

from aqua_attention.bench.timing import read_bandwidth, seconds_of
from aqua_attention.io.files import write_json
from aqua_attention.ops.layout import TILE
from aqua_attention.report.tables import markdown

KV_HEADS, GROUP, DIM, SCORED = 8, 4, 128, 32
SWEEP = [(programs, warps, stages) for programs in (8, 16, 32) for warps in (1, 4) for stages in (2, 4)]
"""Programs of each sequence and head, their warps, and stages of their loads."""
ROWS = 32
"""Tokens that a program reads at once."""


def main():
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="32x32768", help="sequences x tokens")
    parser.add_argument("--share", type=float, default=0.1, help="of tokens that are attended to")
    parser.add_argument("--json", help="write all figures here")
    given = parser.parse_args()
    batch, length = map(int, given.size.split("x"))
    if length % (TILE * max(programs for programs, *_ in SWEEP)):
        parser.error(f"--size is {given.size}: tokens must be a multiple of {TILE * max(p for p, *_ in SWEEP)}")
    if not torch.cuda.is_available():
        parser.error("this measures a CUDA GPU: there is none")
    torch.manual_seed(0)
    peak, places, tiles = read_bandwidth(), batch * KV_HEADS, length // TILE
    found = {"reading in a row": (None, peak)}
    codes = torch.zeros(places, tiles, DIM, TILE, dtype=torch.uint8, device="cuda")
    dims = torch.rand(places, DIM, device="cuda").argsort(-1)[:, :SCORED].int().contiguous()
    weights = torch.empty(places, tiles, GROUP, TILE, dtype=torch.float16, device="cuda")
    sums = torch.empty(places * max(programs for programs, *_ in SWEEP), device="cuda")
    for name, written in (("runs of the copy", None), ("the same, and weights written", weights)):
        seconds = best(partial(read_runs, codes, dims, written, sums, places, tiles))
        moved = places * length * (SCORED + (0 if written is None else 2 * GROUP))
        found[name] = (seconds, moved / seconds)
    del codes, weights
    keys, values = (torch.zeros(places, length, DIM, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    count = round(given.share * length) // (ROWS * 32) * ROWS * 32
    tokens = torch.rand(places, length, device="cuda").argsort(-1)[:, :count].sort(-1).values.int().contiguous()
    seconds = best(partial(read_rows, keys, values, tokens, sums, places, length, count))
    found["keys and values of chosen tokens"] = (seconds, places * count * (4 + 4 * DIM) / seconds)
    rows = [
        [name, "" if seconds is None else f"{1e6 * seconds:.0f}", f"{rate / 1e12:.2f}", f"{rate / peak:.0%}"]
        for name, (seconds, rate) in found.items()
    ]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {given.size}\n")
    print(markdown(["", "us", "TB/s", "of reading in a row"], rows))
    if given.json:
        results = [{"name": name, "seconds": each[0], "rate": each[1]} for name, each in found.items()]
        write_json(given.json, {"size": given.size, "share": given.share, "peak": peak, "results": results})


def best(run):
    """Seconds of the fastest of SWEEP."""
    return min(seconds_of(partial(run, *each)) for each in SWEEP)


def read_runs(codes, dims, weights, sums, places, tiles, programs, warps, stages):
    """Read the chosen dimensions of every tile."""
    _read_runs[(programs, places)](
        codes, dims, weights, sums, tiles, DIM, SCORED, GROUP, TILE, stages, weights is not None, num_warps=warps
    )


def read_rows(keys, values, tokens, sums, places, length, count, programs, warps, stages):
    """Read the keys and values of the listed tokens."""
    _read_rows[(programs, places)](keys, values, tokens, sums, length, count, DIM, ROWS, stages, num_warps=warps)


@triton.jit
def _read_runs(
    codes_ptr,
    dims_ptr,
    weights_ptr,
    sums_ptr,
    tiles,
    DIM: tl.constexpr,
    CHOSEN: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    WRITES: tl.constexpr,
):
    program, place = tl.program_id(0), tl.program_id(1).to(tl.int64)
    each = tiles // tl.num_programs(0)
    dims, tokens, heads = (
        tl.load(dims_ptr + place * CHOSEN + tl.arange(0, CHOSEN)),
        tl.arange(0, TILE),
        tl.arange(0, GROUP),
    )
    total = tl.zeros([CHOSEN, TILE], tl.int32)
    for tile in tl.range(program * each, program * each + each, num_stages=STAGES):
        at = place * tiles + tile
        total += tl.load(codes_ptr + at * (DIM * TILE) + dims[:, None] * TILE + tokens[None, :]).to(tl.int32)
        if WRITES:
            zeros = tl.zeros([GROUP, TILE], tl.float16)
            tl.store(weights_ptr + at * (GROUP * TILE) + heads[:, None] * TILE + tokens[None, :], zeros)
    tl.store(sums_ptr + place * tl.num_programs(0) + program, tl.sum(tl.sum(total, 0), 0).to(tl.float32))


@triton.jit
def _read_rows(
    keys_ptr,
    values_ptr,
    tokens_ptr,
    sums_ptr,
    length,
    count,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    program, place = tl.program_id(0), tl.program_id(1).to(tl.int64)
    each = count // tl.num_programs(0)
    columns, total = tl.arange(0, DIM), tl.zeros([ROWS, DIM], tl.float32)
    for start in tl.range(program * each, program * each + each, ROWS, num_stages=STAGES):
        tokens = tl.load(tokens_ptr + place * count + start + tl.arange(0, ROWS))
        at = (place * length + tokens)[:, None] * DIM + columns[None, :]
        total += tl.load(keys_ptr + at).to(tl.float32) + tl.load(values_ptr + at).to(tl.float32)
    tl.store(sums_ptr + place * tl.num_programs(0) + program, tl.sum(tl.sum(total, 0), 0))


if __name__ == "__main__":
    main()
