# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""How many programs choose tokens and attend to them, and the memory that they leave their results in.

All is allocated once. What one program tells another has the number of its step. So a replayed graph takes no old word
for a new one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from aqua_attention.errors import AquaError
from aqua_attention.ops.backends.triton.blocks import VERSION, padded, sm_count, starts_early
from aqua_attention.ops.backends.triton.decode import BY_HAND_GROUP, BY_HAND_VALUES, splits_by_hand
from aqua_attention.ops.backends.triton.token_arguments import Sequences
from aqua_attention.ops.layout import TILE
from aqua_attention.ops.scored import ScoredCache

SCORE_PROGRAMS, LEAST_TILES = 6, 4
"""Programs that score, for each multiprocessor, two rounds of those that run at once; and tiles of one at least."""
SCORE_BY_HAND = 24
"""Of those placed by hand, for each multiprocessor, that a round is made of. Half of them run at once, and share out
better so."""
CHOOSE_PROGRAMS, LEAST_CHOSEN, MOST_CHOSEN, MOST_CHUNKS = 2, 16, 256, 64
"""Programs that choose, for each multiprocessor, which then all run at once; tiles of one at least where a sequence and
head has several, and at most, for its registers; and how many of these programs it has at most, if it needs no more."""
ALONE_PLACES, ALONE_TILES = 64, 128
"""Sequences times heads from which on, and tiles up to which, one program chooses where its registers suffice. With 32
of 32k tokens each (4 x 32k) several take 4 us less than one. With 64 (8 x 32k) they take 4 more. No length between 8k
and 32k was timed. (Kernels before commit e907056, `benchmarks/select_decode.py --share 0.1 --head-shares none
--score-bits 4 --no-dense`, with `--size` of each and `--set token_work.ALONE_PLACES=0`, and 1000.)"""
PARTS, TURNS = 8, 5
"""Programs that meet divide an interval of bits into so many parts, and so often that one of 15 bits is left."""
MOST_SAID = 2 * TURNS * PARTS
"""Numbers that one of them says in a step: two for each part and turn."""
GATHER_PROGRAMS = 2
"""Programs that attend, for each multiprocessor."""
EARLY_TILES = 4096
"""That all sequences and heads have room for. With more of them kernels are launched early, but no program starts
before the kernel ahead has ended: it would take room from those that still work. Early starts, and no early launch
either: 2 x 32k 59 and 61 us, 4 x 32k 93 and 82, 8 x 32k 149 and 116. (Kernels of commit 508574a,
`benchmarks/select_decode.py --share 0.1 --head-shares none --score-bits 4 --no-dense`, with `--size` of each and
`--set token_work.EARLY_TILES=100000`, and 0.)"""
GATHER_STEP = 32
"""Tokens that the kernel placed by hand attends to at a time."""
GATHER_BY_HAND, MOST_KEPT = 8, 128
"""Of those placed by hand, which then all run at once; 0 takes none. Dimensions of keys that their registers hold."""
GATHER_PLACES = 128
"""Sequences times heads up to which these attend to keys and values of 16 bits. With 8, of 32k tokens each, they take
13 us where the others take 23; with 64, of 128k, 162 and 164; with 256, of 32k, 170 and 164
(`benchmarks/select_decode.py --share 0.1 --head-shares none --set token_work.GATHER_PLACES=0`, and 100000)."""


class Scratch(NamedTuple):
    """What the kernels of a step hand on. Places are batch * num_key_value_heads, G the query heads of each.

    Attributes:
        weights: float16 [places, tiles, G, TILE], 2**15 times the weight where the largest of the tile is 1.
        tops: float32 [places, tiles, G], the largest score of a tile.
        part_lse: float32 [places, G, splits + 1], log-sum-exp of the tokens of a program; the last: the exact window.
        words: int32 [places, tiles * TILE // 32], a bit for each token that weighs enough, see `token_choice`.
        tokens: int32 [places, tiles * TILE], the tokens that are read, in order; counts: int32 [places].
        partial, lse: float32 [units, G, value_dim] and [units, G], the attention over a piece of a list.
        arrived: int32 [places], zero: pieces that are done.
        step: int32 [1], counted by what rotates the queries; said: int64 [places, MOST_SAID, chunks], what programs
            say in it, see `token_meeting`.
    """

    weights: Tensor
    tops: Tensor
    part_lse: Tensor
    words: Tensor
    tokens: Tensor
    counts: Tensor
    partial: Tensor
    lse: Tensor
    arrived: Tensor
    step: Tensor
    said: Tensor


class Sizes(NamedTuple):
    """Of a step: batch, num_key_value_heads, kept, value_dim and tiles of what it reads, its query heads, and how many
    dimensions score; programs that score, choose and attend; whether tokens are scored by `token_scores_by_hand`, and
    attended to by `token_gather_by_hand`.
    """

    batch: int
    kv_heads: int
    kept: int
    value_dim: int
    tiles: int
    heads: int
    k: int
    splits: int
    chunks: int
    programs: int
    by_hand: bool
    gather_by_hand: bool

    @staticmethod
    def of(
        shape: tuple[int, int, int, int, int],
        heads: int,
        k: int,
        like: Tensor,
        *,
        paged: bool = False,
        is_quantized: bool = False,
        splits: int | None = None,
        chunks: int | None = None,
        programs: int | None = None,
        by_hand: bool | None = None,
    ) -> Sizes:
        """See `TokenWork.of`; `like`: a tensor on its device, in the dtype of queries; `paged`: a cache of pages;
        `is_quantized`: one of keys and values in 8 bits.
        """
        batch, kv_heads, kept, value_dim, tiles = shape
        places, group, count = batch * kv_heads, heads // kv_heads, sm_count(like)
        if chunks is None:
            # The interpreter runs one program after the other, and none can wait for a later one.
            most = min(MOST_CHUNKS, count - 1)
            chunks = _chunks(places, tiles, count * CHOOSE_PROGRAMS, most) if like.is_cuda else 1
        if chunks >= count:
            raise AquaError(f"chunks is {chunks}: so many programs must run at once, give less than {count}")
        if by_hand is None:
            by_hand = like.is_cuda and VERSION >= (3, 6) and like.element_size() == 2 and group <= BY_HAND_GROUP
        if splits is None and by_hand:
            splits = splits_by_hand(places, tiles, like, SCORE_BY_HAND)
        elif splits is None:
            splits = max(1, min(count * SCORE_PROGRAMS // places, -(-tiles // LEAST_TILES)))
        fits = like.element_size() == 2 and value_dim in BY_HAND_VALUES and kept % 16 == 0 and kept <= MOST_KEPT
        pays = (is_quantized or places <= GATHER_PLACES) and GATHER_BY_HAND > 0
        gather_by_hand = by_hand and not paged and fits and pays
        if programs is None:
            programs = count * (GATHER_BY_HAND if gather_by_hand else GATHER_PROGRAMS)
        return Sizes(*shape, heads, k, splits, chunks, programs, by_hand, gather_by_hand)

    def parts(self, dtype: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of the tensors of a `TokenWork`, and of those of its `Scratch`."""
        batch, kv_heads, kept, value_dim, tiles, heads, k, splits, chunks, programs, *_ = self
        places, group = batch * kv_heads, heads // kv_heads
        units = programs + places
        return {
            "rotated": (dtype, (batch, heads, kept)),
            "dims": (torch.int32, (batch, kv_heads, k)),
            "mask": (torch.int8, (batch, kv_heads, kept)),
            "weights": (torch.float16, (places, tiles, group, TILE)),
            "tops": (torch.float32, (places, tiles, group)),
            "part_lse": (torch.float32, (places, group, splits + 1)),
            "words": (torch.int32, (places, tiles * TILE // 32)),
            "tokens": (torch.int32, (places, tiles * TILE)),
            "counts": (torch.int32, (places,)),
            "partial": (torch.float32, (units, group, value_dim)),
            "lse": (torch.float32, (units, group)),
            "arrived": (torch.int32, (places,)),
            "step": (torch.int32, (1,)),
            "said": (torch.int64, (places, MOST_SAID, chunks)),
        }


@dataclass(frozen=True, eq=False)
class TokenWork:
    """Memory and sizes of grids for steps over one cache; layers of the same shape may share it.

    Attributes:
        rotated: queries, [batch, num_attention_heads, kept].
        dims: int32 [batch, num_key_value_heads, k]; mask: int8 [batch, num_key_value_heads, kept].
        scratch: what kernels hand on.
        splits, chunks, programs: of the kernels that score, choose and attend.
        by_hand: tokens are scored by `token_scores_by_hand`; gather_by_hand: and attended to by `token_gather_by_hand`.
        group: query heads of a key-value head.
    """

    rotated: Tensor
    dims: Tensor
    mask: Tensor
    scratch: Scratch
    splits: int
    chunks: int
    programs: int
    group: int
    by_hand: bool
    gather_by_hand: bool

    @staticmethod
    def of(
        cache: ScoredCache,
        num_attention_heads: int,
        k: int,
        *,
        splits: int | None = None,
        chunks: int | None = None,
        programs: int | None = None,
        by_hand: bool | None = None,
    ) -> TokenWork:
        """For steps with so many query heads and chosen dimensions; numbers of programs: None fills the GPU.

        `chunks`: a power of 2; `by_hand`: None where kernels of that kind take these sizes.

        Raises:
            AquaError: more `chunks` than there are multiprocessors, which could wait for each other for ever.
        """
        like = torch.empty(0, dtype=cache.dtype, device=cache.device)
        given: dict[str, Any] = {"splits": splits, "chunks": chunks, "programs": programs, "by_hand": by_hand}
        sizes = Sizes.of(cache.shape, num_attention_heads, k, like, is_quantized=cache.bits == 8, **given)
        parts = sizes.parts(cache.dtype).items()
        made = {name: torch.zeros(shape, dtype=kind, device=cache.device) for name, (kind, shape) in parts}
        return TokenWork.within(sizes, made)

    @staticmethod
    def within(sizes: Sizes, made: dict[str, Tensor]) -> TokenWork:
        """In memory that is there, see `Sizes.parts`."""
        rotated, dims, mask = made.pop("rotated"), made.pop("dims"), made.pop("mask")
        programs, placed = (sizes.splits, sizes.chunks, sizes.programs), (sizes.by_hand, sizes.gather_by_hand)
        return TokenWork(rotated, dims, mask, Scratch(**made), *programs, sizes.heads // sizes.kv_heads, *placed)

    @staticmethod
    def shared(cache: ScoredCache, num_attention_heads: int, k: int) -> TokenWork:
        """That of the caches that share `cache.memory`; made where none of them has one of this size."""
        *shape, tiles = cache.shape
        key = (*shape, num_attention_heads, k, cache.dtype, cache.bits, cache.device)
        # One for each shape: of layers that have grown all will.
        work = cache.memory.get(key)
        if work is None or work.scratch.weights.shape[1] != tiles:
            cache.memory.pop(key, None)
            work = cache.memory[key] = TokenWork.of(cache, num_attention_heads, k)
        return work

    @property
    def addresses(self) -> list[int]:
        """Where it lies, which a recorded step knows."""
        return [each.data_ptr() for each in (self.rotated, self.dims, self.mask, *self.scratch)]

    def constants(self, cache: Sequences) -> dict[str, int]:
        """What the kernels know when they are compiled."""
        _, _, kept, value_dim, _ = cache.shape
        return {
            "GROUP": self.group,
            "ROWS": padded(self.group),
            "KEPT": kept,
            "KEPT_PADDED": padded(kept),
            "VALUE_DIM": value_dim,
            "VALUE_PADDED": padded(value_dim),
            "BLOCK": cache.block_size,
        }

    def starts_early(self) -> dict[str, int]:
        """Options of its kernels, see `blocks.starts_early`: EARLY is 1 where there are more than `EARLY_TILES`."""
        options, tops = starts_early(self.rotated), self.scratch.tops
        is_large = tops.shape[0] * tops.shape[1] > EARLY_TILES
        return options | {"EARLY": 1} if is_large and options["EARLY"] else options

    @property
    def places(self) -> int:
        """Sequences times key-value heads."""
        return self.scratch.counts.shape[0]


def _chunks(places: int, tiles: int, programs: int, most: int) -> int:
    """Programs of a sequence and head, a power of 2. As many as there is room for, where one's registers do not
    suffice, or few long sequences would leave the GPU idle. Else one, because those that meet wait.
    """
    chunks = int(triton.next_power_of_2(-(-tiles // MOST_CHOSEN)))
    if chunks == 1 and (places >= ALONE_PLACES or tiles <= ALONE_TILES):
        return 1
    # On a GPU of few multiprocessors registers may not suffice.
    chunks = min(chunks, 1 << (most.bit_length() - 1))
    while places * chunks * 2 <= programs and tiles >= chunks * 2 * LEAST_CHOSEN and chunks * 2 <= most:
        chunks *= 2
    return chunks
