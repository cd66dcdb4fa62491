# SPDX-License-Identifier: Apache-2.0
"""Why pages cost what they do: the same decoding step while the GPU fetches 32, 64 or 128 bytes at once from memory.

A chosen dimension of a page is one short run of bytes, 32 of them in int8 with pages of 32 tokens, and its neighbours
are mostly not chosen. What is fetched beyond it is lost. Beside it a kernel that only reads the same bytes, through
the same table: what that loses in pages, arithmetic is not to blame for.

python benchmarks/page_reads.py --json page_reads.json
"""

from __future__ import annotations

import argparse
import ctypes

import torch
import triton
import triton.language as tl

from aqua_attention.bench.decode import measure_decode
from aqua_attention.bench.timing import seconds_of
from aqua_attention.io.files import write_json
from aqua_attention.machine import Shape
from aqua_attention.ops.backends.triton.blocks import key_pointers, token_blocks, token_pointers
from aqua_attention.ops.layout import TILE, Pages, Quantization, TiledCache
from aqua_attention.report.tables import markdown

SHAPE = Shape(torch.device("cuda"), 32, 8, 128, torch.bfloat16)
LAYOUTS = ((None, None), (None, 64), (None, 32), (8, None), (8, 64), (8, 32))
SWEEP = ((16, 8, 1), (32, 8, 3), (32, 8, 2), (32, 4, 2), (32, 16, 1))
"""Programs for each sequence and head, their warps, and stages of their loads."""
FETCH_GRANULARITY = 5
"""cudaLimitMaxL2FetchGranularity. It is of the whole process, and a hint."""


def main():
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="sequences")
    parser.add_argument("--length", type=int, default=32768, help="tokens in each")
    parser.add_argument("--k-ratio", type=float, default=0.5)
    parser.add_argument("--reads-only", action="store_true", help="not the decoding step")
    parser.add_argument("--json", help="write all figures here")
    given = parser.parse_args()
    if given.length % (TILE * max(splits for splits, *_ in SWEEP)):
        parser.error(f"--length is {given.length}: it must be a multiple of {TILE * max(s for s, *_ in SWEEP)}")
    if not torch.cuda.is_available():
        parser.error("this measures a CUDA GPU: there is none")
    torch.cuda.init()
    runtime = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.split('.')[0]}")
    results, rows = [], []
    found = ctypes.c_size_t()
    runtime.cudaDeviceGetLimit(ctypes.byref(found), FETCH_GRANULARITY)
    print(f"by default {found.value} bytes are fetched at once")
    for size in (32, 64, 128):
        if runtime.cudaDeviceSetLimit(FETCH_GRANULARITY, ctypes.c_size_t(size)) or runtime.cudaDeviceGetLimit(
            ctypes.byref(found), FETCH_GRANULARITY
        ):
            raise SystemExit(f"this GPU does not let its fetches be set to {size} bytes")
        result = {"fetched": found.value, "reads": reads(given.batch, given.length, given.k_ratio)}
        times = {"reading alone": result["reads"]}
        if not given.reads_only:
            measured = measure_decode(
                SHAPE, batch=given.batch, length=given.length, k_ratios=(given.k_ratio,), layouts=LAYOUTS
            )
            result |= measured
            ours = [row for row in measured["rows"] if row["k_ratio"] is not None]
            times["decoding"] = [row["seconds"] for row in ours]
        results.append(result)
        if given.json:
            write_json(given.json, {"results": results})
        for name, seconds in times.items():
            by_layout = dict(zip(LAYOUTS, seconds, strict=True))
            for (bits, page), time in by_layout.items():
                over = time / by_layout[bits, None] - 1
                cells = [name, f"{bits or 16} bits", str(page or "none"), f"{1e6 * time:.0f}", f"{over:+.1%}"]
                rows.append([str(found.value), *cells])
    print(markdown(["bytes fetched at once", "", "keys and values", "page", "us", "to no pages"], rows))


def reads(batch, length, k_ratio, heads=8, dim=128):
    """Seconds to read the chosen dimensions of all keys, and all values (in 8 bits without their steps): the best of
    SWEEP, for each of LAYOUTS.
    """
    dims = torch.rand(batch, heads, dim, device="cuda").argsort(-1)[..., : int(k_ratio * dim)].int().contiguous()
    best = []
    for bits, page in LAYOUTS:
        pages = None
        if page is not None:
            table = torch.randperm(batch * length // page, device="cuda").view(batch, -1).int()
            pages = Pages(table, page, table.numel())
        rounding = Quantization(*torch.ones(2, heads, dim, device="cuda")) if bits else None
        cache = TiledCache(batch, heads, dim, dim, length, torch.bfloat16, "cuda", quantization=rounding, pages=pages)
        sums = torch.empty(batch * heads * max(splits for splits, *_ in SWEEP), device="cuda")

        def read(splits, warps, stages, cache=cache, pages=pages, sums=sums):
            table, blocks = (None, 0) if pages is None else (pages.block_table, pages.block_table.shape[1])
            _read[(splits, heads, batch)](
                cache.tiles,
                cache.values,
                table,
                dims,
                sums,
                cache.count // splits,
                blocks,
                *cache.block_strides,
                DIM=dim,
                CHOSEN=dims.shape[2],
                TILE=TILE,
                BLOCK=cache.block_size,
                STAGES=stages,
                num_warps=warps,
            )

        best.append(min(seconds_of(lambda each=each: read(*each)) for each in SWEEP))
    return best


@triton.jit
def _read(
    tiles_ptr,
    values_ptr,
    table_ptr,
    dims_ptr,
    sums_ptr,
    each,
    blocks,
    row_stride,
    group_stride,
    block_stride,
    DIM: tl.constexpr,
    CHOSEN: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    split, group, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place = row * tl.num_programs(1) + group
    first_cell = row.to(tl.int64) * row_stride + group.to(tl.int64) * group_stride
    if table_ptr is not None:
        table_ptr += row * blocks
    dims = tl.load(dims_ptr + place * CHOSEN + tl.arange(0, CHOSEN))
    columns = tl.arange(0, DIM)
    keys, values = tl.zeros([CHOSEN, TILE], tl.float32), tl.zeros([TILE, DIM], tl.float32)
    for tile in tl.range(split * each, split * each + each, num_stages=STAGES):
        cells = token_blocks(table_ptr, first_cell, block_stride, tile, blocks, BLOCK)
        keys += tl.load(key_pointers(tiles_ptr, table_ptr, cells, dims, DIM, BLOCK)).to(tl.float32)
        values_at = token_pointers(values_ptr, table_ptr, cells, DIM, BLOCK)[:, None] + columns[None, :]
        values += tl.load(values_at).to(tl.float32)
    tl.store(sums_ptr + place * tl.num_programs(0) + split, tl.sum(tl.sum(keys, 0), 0) + tl.sum(tl.sum(values, 0), 0))


if __name__ == "__main__":
    main()
