# SPDX-License-Identifier: Apache-2.0
"""Why pages cost what they do: the same decoding step while the GPU fetches 32, 64 or 128 bytes at once from memory.

A chosen dimension of a page is one short run of bytes, 32 of them in int8 with pages of 32 tokens, and its neighbours
are mostly not chosen. What is fetched beyond it is lost.

python benchmarks/page_reads.py --json page_reads.json
"""

from __future__ import annotations

import argparse
import ctypes

import torch

from aqua_attention.bench.decode import measure_decode
from aqua_attention.files import write_json
from aqua_attention.tables import markdown

LAYOUTS = ((None, None), (None, 64), (None, 32), (8, None), (8, 64), (8, 32))
FETCH_GRANULARITY = 5
"""cudaLimitMaxL2FetchGranularity. It is of the whole process, and a hint."""


def main():
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="sequences")
    parser.add_argument("--length", type=int, default=32768, help="tokens in each")
    parser.add_argument("--k-ratio", type=float, default=0.5)
    parser.add_argument("--json", help="write all figures here")
    given = parser.parse_args()
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
        result = measure_decode(batch=given.batch, length=given.length, k_ratios=(given.k_ratio,), layouts=LAYOUTS)
        results.append(result | {"fetched": found.value})
        if given.json:
            write_json(given.json, {"results": results})
        ours = {(row["bits"], row["page"]): row["seconds"] for row in result["rows"] if row["k_ratio"] is not None}
        for (bits, page), seconds in ours.items():
            over = seconds / ours[bits, None] - 1
            cells = [f"{bits or 16} bits", str(page or "none"), f"{1e6 * seconds:.0f}", f"{over:+.1%}"]
            rows.append([str(found.value), *cells])
    print(markdown(["bytes fetched at once", "keys and values", "page", "us", "to no pages"], rows))


if __name__ == "__main__":
    main()
