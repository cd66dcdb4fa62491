# SPDX-License-Identifier: Apache-2.0
"""A decoding step over a serving engine's pages: write one token a sequence and attend, against FlashAttention.

Each time is of one layer in a CUDA graph over so many layers that none finds its pages in the GPU's cache. Before a
setting is timed its answers are compared with those of plain torch over the same pages.

python benchmarks/serve_decode.py --json serve_decode.json
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial

import torch

from aqua_attention.bench.dense import BASELINES
from aqua_attention.bench.timing import read_bandwidth, seconds_of
from aqua_attention.config import AquaConfig
from aqua_attention.io.files import write_json
from aqua_attention.ops.api import decode_pages
from aqua_attention.ops.backends.triton import paged_decode
from aqua_attention.ops.layout import Quantization
from aqua_attention.ops.pages import SCALE_BYTES, PagedCache, PagedLayer, Step
from aqua_attention.ops.plan import LayerPlan
from aqua_attention.ops.scored_pages import ScoredPages, scored_content
from aqua_attention.ops.tokens import scored_bytes
from aqua_attention.report.tables import markdown

HEADS, KV_HEADS, DIM, BLOCK = 32, 8, 128, 64
DTYPE = torch.bfloat16
LEAST_BYTES, MOST_LAYERS = 1 << 30, 32
SETTINGS = {
    "dense, our kernel": {},
    "k_ratio 1": {"k_ratio": 1.0, "s_ratio": 0.0},
    "k_ratio 0.5": {"k_ratio": 0.5},
    "k_ratio 0.5, int8": {"k_ratio": 0.5, "bits": 8},
    "k_ratio 0.25": {"k_ratio": 0.25},
    "s_ratio 0.25": {"k_ratio": 1.0, "s_ratio": 0.25, "sink": 0, "recent": 0},
    "k_ratio 0.5, s_ratio 0.25": {"k_ratio": 0.5, "s_ratio": 0.25, "sink": 0, "recent": 0},
    "10% of the tokens": {"k_ratio": 0.25, "score_bits": 8, "select_tokens": 0.1},
    "24% of the tokens": {"k_ratio": 0.25, "score_bits": 8, "select_tokens": 0.24},
}
"""Of `select_tokens` a share of the sequence."""
AT_ONCE = 1 << 16
"""Tokens that are written at once into pages that hold a copy of the keys."""
TOLERANCE = 0.05
"""Of the difference, relative: where two dimensions are nearly as large, bfloat16 decides which is chosen."""


def main():
    """Compare, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", help="sequences x tokens, as 32x32768; repeat for several")
    parser.add_argument("--capacity", type=int, default=0, help="tokens that the block table has room for")
    parser.add_argument("--set", action="append", default=[], help="a constant of `paged_decode`, as WARPS=4; repeat")
    parser.add_argument("--only", help="settings whose name has this in it")
    parser.add_argument("--json", help="write all figures here")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this measures a CUDA GPU: there is none")
    for name, value in (each.split("=") for each in given.set):
        assert hasattr(paged_decode, name), name
        setattr(paged_decode, name, int(value))
    sizes = given.size or ["1x8192", "1x32768", "8x8192", "8x32768", "32x8192", "32x32768"]
    peak, results = read_bandwidth(), []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, reads {peak / 1e12:.2f} TB/s at most\n")
    for size in sizes:
        batch, length = map(int, size.split("x"))
        results += measure(batch, length, max(given.capacity, length), peak, given.only or "")
        if given.json:
            write_json(given.json, {"peak": peak, "results": results})


def measure(batch, length, capacity, peak, only):
    """All settings at one size."""
    found = []
    for name, seconds in baselines(batch, length):
        size = 2 if "fp8" not in name else 1
        found.append(
            {"name": name, "seconds": seconds, "bytes": 2 * batch * length * KV_HEADS * DIM * size, "error": None}
        )
    for name, config in SETTINGS.items():
        if only not in name:
            continue
        torch.cuda.empty_cache()
        found.append({"name": name, **ours(config, batch, length, capacity)})
    dense, rows = found[0]["seconds"], []
    for each in found:
        rate = each["bytes"] / each["seconds"]
        cells = [each["name"], f"{1e6 * each['seconds']:.1f}", f"{dense / each['seconds']:.2f}"]
        error = "" if each["error"] is None else f"{each['error']:.2%}"
        rows.append([*cells, f"{rate / 1e12:.2f}", f"{rate / peak:.0%}", error])
    print(markdown([f"{batch} x {length}", "us", "to the first", "TB/s", "of reads", "error"], rows) + "\n")
    return [{"batch": batch, "length": length, **each} for each in found]


def ours(config, batch, length, capacity):
    """Seconds of one layer, the bytes it must read, and how far its answers are from those of plain torch."""
    torch.manual_seed(0)
    plan, bits, share = None, config.get("bits"), config.get("select_tokens")
    if share is not None:
        config = config | {"select_tokens": round(share * length)}
    if config:
        setting = AquaConfig.paper(**{"share": "group", "selection": "weighted", "sink": 4, "recent": 64} | config)
        kept = setting.kept_dims(DIM)
        rotation = torch.linalg.qr(torch.randn(KV_HEADS, DIM, DIM))[0][..., :kept].contiguous().cuda()
        plan = LayerPlan.of(rotation, torch.rand(KV_HEADS, kept).cuda() + 0.1, setting)
    kept = DIM if plan is None else plan.kept
    units = Quantization(torch.ones(KV_HEADS, kept).cuda(), torch.zeros(KV_HEADS, kept).cuda())
    if share is not None:
        plan = replace(plan, key_scale=units.channel_scale, key_mean=units.channel_mean)
    layer = PagedLayer(plan, DIM**-0.5)
    width = kept + DIM + (SCALE_BYTES if bits else 0)
    if share is not None:
        width = scored_content(kept, DIM, DTYPE.itemsize) // DTYPE.itemsize
    blocks = -(-length // BLOCK)
    of_layer = batch * blocks * KV_HEADS * BLOCK * width * (1 if bits else 2)
    layers = max(1, min(MOST_LAYERS, LEAST_BYTES // of_layer + 1))
    make = filled if share is None else filled_with_copy
    caches = [make(batch * blocks, kept, width, units if bits or share else None) for _ in range(layers)]
    table = torch.zeros(batch, -(-capacity // BLOCK), dtype=torch.int32, device="cuda")
    table[:, :blocks] = torch.randperm(batch * blocks).view(batch, blocks)
    lengths = torch.full((batch,), length, dtype=torch.int32, device="cuda")
    slots = table[:, blocks - 1].long() * BLOCK + (length - 1) % BLOCK
    step = Step(table, lengths, slots, torch.zeros(batch * KV_HEADS, dtype=torch.int32, device="cuda"))
    # As a model has them: side by side.
    states = torch.randn(batch, HEADS + 2 * KV_HEADS, DIM, dtype=DTYPE, device="cuda")
    given = states.split([HEADS, KV_HEADS, KV_HEADS], 1)
    output = torch.empty(batch, HEADS, DIM, dtype=DTYPE, device="cuda")
    error = compared(given, caches[0], layer, step, output)

    def run():
        for cache in caches:
            decode_pages(*given, cache, layer, step, output, impl="triton")

    k = kept if plan is None else plan.k
    read = (k + DIM) * (1 if bits else 2) + (SCALE_BYTES if bits else 0)
    if share is not None:
        read = scored_bytes(k, plan.config.score_bits) + share * (kept + DIM) * DTYPE.itemsize
    read *= batch * length * KV_HEADS
    return {"seconds": seconds_of(run) / layers, "bytes": read, "error": error, "layers": layers}


def filled(blocks, kept, width, quantization):
    """Pages of random keys and values."""
    if quantization is None:
        shape = (blocks, KV_HEADS, BLOCK, width)
        return PagedCache(torch.randn(shape, dtype=DTYPE, device="cuda"), kept, DIM)
    storage = torch.randint(1, 256, (blocks, KV_HEADS, BLOCK, width), dtype=torch.uint8, device="cuda")
    cache = PagedCache(storage, kept, DIM, quantization)
    for scales in (cache.key_scales, cache.value_scales):
        scales.fill_(1 / 64)
    return cache


def filled_with_copy(blocks, kept, width, scoring):
    """Such pages with a copy of the keys, by which tokens are chosen."""
    storage = torch.zeros(blocks, KV_HEADS, BLOCK, width, dtype=DTYPE, device="cuda")
    cache = ScoredPages(storage, kept, DIM, scoring=scoring)
    for start in range(0, blocks * BLOCK, AT_ONCE):
        slots = torch.arange(start, min(start + AT_ONCE, blocks * BLOCK), device="cuda")
        states = [torch.randn(len(slots), KV_HEADS, width, dtype=DTYPE, device="cuda") for width in (kept, DIM)]
        cache.write(*states, slots)
    return cache


def compared(given, cache, layer, step, output):
    """How far our kernels' answers are from plain torch's, relative, over the first and the last sequence."""
    decode_pages(*given, cache, layer, step, output, impl="triton")
    differences, sizes = 0.0, 0.0
    for row in sorted({0, len(output) - 1}):
        one = slice(row, row + 1)
        own = Step(step.block_table[one], step.lengths[one], step.slots[one], step.arrived)
        expected = torch.empty_like(output[one])
        decode_pages(*(each[one] for each in given), cache, layer, own, expected, impl="torch")
        differences += float((output[one].float() - expected.float()).square().sum())
        sizes += float(expected.float().square().sum())
    error = (differences / sizes) ** 0.5
    if not error <= TOLERANCE:
        raise SystemExit(f"answers differ by {error:.1%}: nothing is measured")
    return error


def baselines(batch, length):
    """Name and seconds of dense attention: FlashAttention over vLLM's own pages, or else the fastest that torch has."""
    layers = max(1, min(MOST_LAYERS, LEAST_BYTES // (4 * batch * length * KV_HEADS * DIM) + 1))
    try:
        names = {"FlashAttention-3 over vLLM's pages, with its write": DTYPE, "the same in fp8": torch.float8_e4m3fn}
        # One after the other: both may not fit.
        return [
            (name, seconds_of(flash_attention(batch, length, layers, kind)) / layers) for name, kind in names.items()
        ]
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        print(f"no FlashAttention over pages ({error}): dense attention on contiguous keys instead, without a write")
        query = torch.randn(batch, HEADS, DIM, dtype=DTYPE, device="cuda")
        shape = (batch, KV_HEADS, length, DIM)
        states = [[torch.randn(shape, dtype=DTYPE, device="cuda") for _ in range(2)] for _ in range(layers)]
        runs = {}
        for name in ("FlashAttention-3", "SDPA cuDNN", "SDPA flash", "SDPA flash, packed"):
            try:
                made = [BASELINES[name](query, *each) for each in states]
                made[0]()
            except (ImportError, RuntimeError) as reason:
                print(f"{name}: {reason}")
                continue
            runs[name] = partial(all_of, made)
    return [min(((name, seconds_of(run) / layers) for name, run in runs.items()), key=lambda pair: pair[1])]


def all_of(runs):
    """One after the other."""
    for run in runs:
        run()


def flash_attention(batch, length, layers, kind, block=16):
    """As vLLM's own backend calls it, write and attention, over keys and values of this dtype."""
    from vllm import _custom_ops as ops
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    blocks, is_fp8 = -(-length // block), kind != DTYPE
    shape = (batch * blocks, block, KV_HEADS, DIM)
    caches = [[torch.randn(shape, dtype=DTYPE, device="cuda").to(kind) for _ in range(2)] for _ in range(layers)]
    table = torch.randperm(batch * blocks, device="cuda").view(batch, blocks).int()
    starts, lengths = torch.arange(batch + 1).int().cuda(), torch.full((batch,), length).int().cuda()
    slots = table[:, -1].long() * block + (length - 1) % block
    query, output = (torch.randn(batch, HEADS, DIM, dtype=DTYPE, device="cuda") for _ in range(2))
    key, value = (torch.randn(batch, KV_HEADS, DIM, dtype=DTYPE, device="cuda") for _ in range(2))
    one = torch.ones(1, device="cuda")
    scales = {f"{name}_descale": one.expand(batch, KV_HEADS) for name in "qkv"} if is_fp8 else {}

    def run():
        for keys, values in caches:
            bytes_of = [each.view(torch.uint8) if is_fp8 else each for each in (keys, values)]
            ops.reshape_and_cache_flash(key, value, *bytes_of, slots, "fp8" if is_fp8 else "auto", one, one)
            flash_attn_varlen_func(
                query.to(kind),
                keys,
                values,
                1,
                starts,
                length,
                seqused_k=lengths,
                causal=True,
                block_table=table,
                out=output,
                fa_version=3,
                **scales,
            )

    run()
    return run


if __name__ == "__main__":
    main()
