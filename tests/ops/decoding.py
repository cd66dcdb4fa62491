# SPDX-License-Identifier: Apache-2.0
"""What tests of the decoding kernels share: problems, and what is near enough."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase

from aqua_attention.ops.layout import TILE, Chosen, Pages, Quantization, TiledCache
from aqua_attention.ops.reference import attention_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter computes bfloat16 wrongly, without a word.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
# Shrinking takes minutes in the interpreter.
PHASES = [Phase.explicit, Phase.generate]
CODES_EPS = torch.finfo(torch.float16).eps
"""Over codes of 8 bits all products are in float16."""
HEADS = [(4, 2), (2, 2), (6, 1), (8, 1)]
LAYOUTS = ["plain", "int8", "pages of 32", "pages of 64", "int8 in pages of 32", "int8 in pages of 128"]


@pytest.fixture(autouse=True, scope="module")
def uninitialised_memory_is_nan():
    """What a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def random(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def layout(name, batch, groups, kept, length, seed=0):
    """Options of a cache: quantized or not, in pages (in any order, some of nobody) or not."""
    quantization, pages = None, None
    if "int8" in name:
        scale = random(groups, kept, seed=seed).abs() + 0.1
        quantization = Quantization(scale, 3 * random(groups, kept, seed=seed + 1))
    if (page := name.split()[-1]).isdecimal():
        blocks = -(-length // TILE) * TILE // int(page)
        order = torch.randperm(batch * blocks + 3, generator=torch.Generator().manual_seed(seed))
        table = order[: batch * blocks].view(batch, blocks).to(DEVICE, torch.int32)
        pages = Pages(table, int(page), batch * blocks + 3)
    return {"quantization": quantization, "pages": pages}


def problem(heads, lengths, kept, value_dim, dtype, seed=0, name="plain"):
    """A cache of rows of these lengths, in tiles and as plain tensors, and a query for each row."""
    (count, groups), length, batch = heads, max(lengths), len(lengths)
    keys = random(batch, groups, length, kept, seed=seed, dtype=dtype)
    values = random(batch, groups, length, value_dim, seed=seed + 1, dtype=dtype)
    options = layout(name, batch, groups, kept, length + 3, seed)
    cache = TiledCache(batch, groups, kept, value_dim, length + 3, dtype, DEVICE, **options)
    # Behind a row's end is what must not be read.
    hidden = torch.arange(length, device=DEVICE) >= torch.tensor(lengths, device=DEVICE)[:, None]
    cache.fill(
        keys.masked_fill(hidden[:, None, :, None], torch.nan),
        values.masked_fill(hidden[:, None, :, None], torch.nan),
        torch.tensor(lengths, device=DEVICE),
    )
    if options["quantization"] is not None:
        keys, values = cache.read(dtype=torch.float32)
    if (pages := options["pages"]) is not None:
        for row, held in enumerate(lengths):
            pages.block_table[row, -(-held // pages.block_size) :] = 1 << 30
    return random(batch, count, kept, seed=seed + 2, dtype=dtype), keys, values, cache


def chosen(query, groups, count):
    """Dimensions of largest summed square for each group, and the same as the reference takes them."""
    batch, heads, kept = query.shape
    size = query.float().view(batch, groups, heads // groups, kept).square().sum(2)
    dims = size.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    mask = torch.zeros_like(size, dtype=torch.bool).scatter_(-1, dims, True)
    return Chosen.of(dims, kept), mask.repeat_interleave(heads // groups, 1)[:, :, None]


def check(found, query, keys, values, selected, lengths, eps=0.0, **options):
    """As close to float64 as a few times the reference in the same dtype, in every row.

    `eps`: of what the kernel multiplies, where that is coarser than the dtype.
    """
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        given = [query[one, :, None], keys[one, :, :length], values[one, :, :length]]
        mask = None if selected is None else selected[one]
        exact = attention_reference(*(each.double() for each in given), mask, **options)[0, :, 0]
        plain = attention_reference(*(each.to(query.dtype) for each in given), mask, **options)[0, :, 0].double()
        error, scale = (found[row].double() - exact).abs().max(), exact.abs().max()
        assert error <= 4 * (plain - exact).abs().max() + 4 * max(eps, torch.finfo(query.dtype).eps) * scale


def as_mask(taken, query):
    """What `prepare` chose, as `select_dimensions` says it."""
    dims, flags, counts, _ = taken
    (batch, groups, count), (heads, kept) = dims.shape, query.shape[1:]
    mask = torch.zeros(batch, groups, kept, dtype=torch.bool, device=DEVICE)
    for row in range(batch):
        for group in range(groups):
            mask[row, group, dims[row, group, : count if counts is None else counts[row, group]].long()] = True
    assert torch.equal(mask, flags.bool())
    return mask.repeat_interleave(heads // groups, 1)[:, :, None]
