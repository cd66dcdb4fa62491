# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""States as codes of 8 bits and back on a GPU, in one pass each: the 8-bit part of `cache.quantized.Quantized`."""

import triton
import triton.language as tl
from torch import Tensor, bfloat16, uint8

from aqua_attention.ops.backend import Channels
from aqua_attention.ops.backends.triton.blocks import on_device_of, padded
from aqua_attention.ops.backends.triton.rotate import by_token

TOKENS, WARPS = 32, 4
"""Tokens of one head that a program takes at once."""


def encode(states: Tensor, channels: Channels) -> tuple[Tensor, Tensor, Tensor]:
    """See `Backend.encode`."""
    batch, heads, length, width = states.shape
    states = by_token(states)
    codes = states.new_empty(states.shape, dtype=uint8)
    scales, zero_points = (states.new_empty((batch, heads, length, 1), dtype=bfloat16) for _ in range(2))
    with on_device_of(states):
        _encode[(triton.cdiv(length, TOKENS), heads, batch)](
            states,
            *_pointers(channels),
            codes,
            scales,
            zero_points,
            *states.stride()[:3],
            length,
            WIDTH=width,
            WIDTH_PADDED=padded(width),
            TOKENS=TOKENS,
            num_warps=WARPS,
        )
    return codes, scales, zero_points


def widen(codes: Tensor, scales: Tensor, zero_points: Tensor, channels: Channels, out: Tensor) -> None:
    """See `Backend.widen`."""
    batch, heads, length, width = codes.shape
    with on_device_of(codes):
        _widen[(triton.cdiv(length, TOKENS), heads, batch)](
            codes,
            scales,
            zero_points,
            *_pointers(channels),
            out,
            *codes.stride()[:3],
            *scales.stride()[:3],
            *zero_points.stride()[:3],
            *out.stride()[:3],
            length,
            WIDTH=width,
            WIDTH_PADDED=padded(width),
            TOKENS=TOKENS,
            num_warps=WARPS,
        )


def _pointers(channels: Channels) -> tuple[Tensor | None, Tensor | None]:
    """Scale and mean of the channels, contiguous."""
    return (None, None) if channels is None else (channels[0].contiguous(), channels[1].contiguous())


@triton.jit
def _encode(
    states_ptr,
    channel_scale_ptr,
    channel_mean_ptr,
    codes_ptr,
    scales_ptr,
    zero_points_ptr,
    stride_batch,
    stride_head,
    stride_token,
    length,
    WIDTH: tl.constexpr,
    WIDTH_PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
):
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    tokens, dims = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, WIDTH_PADDED)
    column = (dims < WIDTH)[None, :]
    there = (tokens < length)[:, None] & column
    states = tl.load(
        states_ptr
        + row * stride_batch
        + head * stride_head
        + tokens.to(tl.int64)[:, None] * stride_token
        + dims[None, :],
        there,
        0.0,
    ).to(tl.float32)
    if channel_scale_ptr is not None:
        mean = tl.load(channel_mean_ptr + head * WIDTH + dims, dims < WIDTH, 0.0)
        scale = tl.load(channel_scale_ptr + head * WIDTH + dims, dims < WIDTH, 1.0)
        states = (states - mean[None, :]) / scale[None, :]
    most = tl.max(tl.where(column, states, float("-inf")), 1)
    least = tl.min(tl.where(column, states, float("inf")), 1)
    # The largest of numbers leaves NaN out, which must spoil its token.
    middle = tl.where(tl.sum(states * 0, 1) == 0, (most + least) / 2, float("nan"))
    zero_point = middle.to(tl.bfloat16)
    # Everything follows scale and zero point as they are stored.
    states = tl.where(column, states - zero_point.to(tl.float32)[:, None], 0.0)
    scale = tl.maximum(tl.max(tl.abs(states), 1) / 127.5, 1e-30).to(tl.bfloat16)
    codes = tl.minimum(tl.maximum(tl.floor(states / scale.to(tl.float32)[:, None]) + 128, 0.0), 255.0)
    places = (row * tl.num_programs(1) + head) * length + tokens
    tl.store(codes_ptr + places[:, None] * WIDTH + dims[None, :], codes.to(tl.uint8), there)
    tl.store(scales_ptr + places, scale, tokens < length)
    tl.store(zero_points_ptr + places, zero_point, tokens < length)


@triton.jit
def _widen(
    codes_ptr,
    scales_ptr,
    zero_points_ptr,
    channel_scale_ptr,
    channel_mean_ptr,
    out_ptr,
    codes_batch,
    codes_head,
    codes_token,
    scales_batch,
    scales_head,
    scales_token,
    zero_points_batch,
    zero_points_head,
    zero_points_token,
    out_batch,
    out_head,
    out_token,
    length,
    WIDTH: tl.constexpr,
    WIDTH_PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
):
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    tokens, dims = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, WIDTH_PADDED)
    given, places = tokens < length, tokens.to(tl.int64)
    there = given[:, None] & (dims < WIDTH)[None, :]
    codes = tl.load(
        codes_ptr + row * codes_batch + head * codes_head + places[:, None] * codes_token + dims[None, :], there, 0
    )
    scale = tl.load(scales_ptr + row * scales_batch + head * scales_head + places * scales_token, given, 0.0)
    zero_point = tl.load(
        zero_points_ptr + row * zero_points_batch + head * zero_points_head + places * zero_points_token, given, 0.0
    )
    scale = scale.to(tl.float32)
    shift = zero_point.to(tl.float32) - 127.5 * scale
    states = codes.to(tl.float32) * scale[:, None] + shift[:, None]
    if channel_scale_ptr is not None:
        mean = tl.load(channel_mean_ptr + head * WIDTH + dims, dims < WIDTH, 0.0)
        channel_scale = tl.load(channel_scale_ptr + head * WIDTH + dims, dims < WIDTH, 1.0)
        states = states * channel_scale[None, :] + mean[None, :]
    tl.store(
        out_ptr + row * out_batch + head * out_head + places[:, None] * out_token + dims[None, :],
        states.to(out_ptr.dtype.element_ty),
        there,
    )
