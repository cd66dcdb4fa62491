# SPDX-License-Identifier: Apache-2.0
"""What tests over pages share: sequences in pages of any order, and one token more for each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from decoding import DEVICE, random
from torch import Tensor

import aqua_attention as aqua
from aqua_attention.ops import api
from aqua_attention.ops.layout import Quantization
from aqua_attention.ops.pages import SCALE_BYTES, PagedCache, PagedLayer, Step
from aqua_attention.ops.plan import LayerPlan
from aqua_attention.ops.scored import score_quantization
from aqua_attention.ops.scored_pages import ScoredPages, scored_content


@dataclass
class Problem:
    """Sequences in pages, all but their last tokens, which are `query`, `key` and `value`.

    `keys` are as they are stored, [batch, heads, tokens, kept], and `values` likewise, the last tokens among them.
    """

    layer: PagedLayer
    cache: PagedCache
    step: Step
    lengths: list[int]
    query: Tensor
    key: Tensor
    value: Tensor
    keys: Tensor
    values: Tensor
    options: dict

    @property
    def output(self):
        return torch.full((len(self.lengths), self.query.shape[1], self.values.shape[3]), torch.nan).to(self.query)

    def decode(self, impl):
        output = self.output
        given = (self.query, self.key, self.value, self.cache, self.layer, self.step, output)
        api.decode_pages(*given, impl=impl)
        return output

    def held(self):
        """Keys and values that a decoding step multiplies: what is stored, rounded or not."""
        if self.cache.quantization is None:
            return self.keys, self.values
        keys, values = self.keys.float(), self.values.float()
        for row, length in enumerate(self.lengths):
            if length:
                found = self.cache.read(self.step.block_table[row], length, torch.float32)
                keys[row, :, :length], values[row, :, :length] = (each[0] for each in found)
        return keys, values


def pages(blocks, groups, block_size, kept, value_dim, dtype, *, bits=None, spare=0, seed=0):
    """Pages full of NaN, with `spare` elements behind each token's."""
    if bits is None:
        shape = (blocks, groups, block_size, kept + value_dim + spare)
        return PagedCache(torch.full(shape, torch.nan, dtype=dtype, device=DEVICE), kept, value_dim)
    shape = (blocks, groups, block_size, kept + value_dim + SCALE_BYTES + spare)
    scale, mean = random(groups, kept, seed=seed).abs() + 0.1, 3 * random(groups, kept, seed=seed + 1)
    storage = torch.full(shape, 255, dtype=torch.uint8, device=DEVICE)  # scales of NaN
    return PagedCache(storage, kept, value_dim, Quantization(scale, mean))


def scored_pages(blocks, groups, block_size, kept, value_dim, dtype, scoring, *, spare=0):
    """Pages full of NaN that have what tokens are chosen by."""
    width = scored_content(kept, value_dim, dtype.itemsize) // dtype.itemsize + spare
    storage = torch.full((blocks, groups, block_size, width), torch.nan, dtype=dtype, device=DEVICE)
    return ScoredPages(storage, kept, value_dim, scoring=scoring)


def problem(
    heads,
    lengths,
    widths,
    dtype=torch.float32,
    *,
    seed=0,
    block_size=64,
    bits=None,
    window=None,
    softcap=None,
    rotation=None,
    impl="triton",
    **config,
):
    """Sequences of these lengths, of which a length of 0 is none; without `config` every dimension is multiplied.

    Args:
        widths: head_dim, kept, value_dim.
    """
    (count, groups), (head_dim, kept, value_dim), batch = heads, widths, len(lengths)
    plan = None
    if config:
        config = aqua.AquaConfig.paper(**{"share": "group", "s_ratio": 1 - kept / head_dim, "bits": bits} | config)
        if rotation is None:
            rotation = torch.linalg.qr(random(groups, head_dim, head_dim, seed=seed))[0][..., :kept]
        rms = random(groups, kept, seed=seed + 1).abs() + 0.1
        plan = LayerPlan.of(rotation.contiguous(), rms, config)
        plan.key_scale = random(groups, kept, seed=seed + 6).abs() + 0.5
        plan.key_mean = random(groups, kept, seed=seed + 7)
    layer = PagedLayer(plan, head_dim**-0.5, softcap, window)
    blocks = -(-max(lengths) // block_size) + 1
    order = torch.randperm(batch * blocks + 3, generator=torch.Generator().manual_seed(seed))
    table = order[: batch * blocks].view(batch, blocks).to(DEVICE, torch.int32)
    sizes = batch * blocks + 3, groups, block_size, kept, value_dim, dtype
    if plan is not None and plan.config.chooses_tokens:
        cache = scored_pages(*sizes, score_quantization(plan), spare=4)
    else:
        cache = pages(*sizes, bits=bits, spare=4, seed=seed + 5)
    total = max(lengths)
    key = random(batch, groups, total, head_dim, seed=seed + 2, dtype=dtype)
    values = random(batch, groups, total, value_dim, seed=seed + 3, dtype=dtype)
    # As a model has it: heads of a token beside those of other states.
    query = random(batch, count + 3, head_dim, seed=seed + 4, dtype=dtype)[:, 1 : count + 1]
    own = [(row, token) for row, length in enumerate(lengths) for token in range(length - 1)] + [(0, 0)]
    own = [own[index] for index in torch.randperm(len(own), generator=torch.Generator().manual_seed(seed)).tolist()]
    rows, tokens = (torch.tensor(each, device=DEVICE) for each in zip(*own, strict=True))
    slots = slots_of(table, rows, tokens, block_size)
    if (0, 0) in own and lengths[0] < 2:
        slots[own.index((0, 0))] = -1
    api.write_pages(key[rows, :, tokens], values[rows, :, tokens], cache, layer, slots, impl=impl)
    last = torch.tensor(lengths, device=DEVICE) - 1
    every = torch.arange(batch, device=DEVICE)
    new = torch.where(last >= 0, slots_of(table, every, last.clamp(0), block_size), -1)
    for row, length in enumerate(lengths):
        table[row, -(-length // block_size) :] = 1 << 30
    last = last.clamp(0)
    step = Step(table, (torch.tensor(lengths, device=DEVICE)).int(), new, torch.zeros(99, device=DEVICE).int())
    keys = key if plan is None else api.rotate(key, plan.rotation)
    exact = {} if plan is None else {"sink": plan.sink, "recent": plan.recent}
    options = {"scaling": layer.scaling, "softcap": softcap} | exact
    given = (query, key[every, :, last], values[every, :, last], keys, values, options)
    return Problem(layer, cache, step, list(lengths), *given)


def slots_of(table, rows, tokens, block_size):
    return table[rows, tokens // block_size].long() * block_size + tokens % block_size
