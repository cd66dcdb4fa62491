# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Weights of tokens as numbers of 16 bits in their order.

An order has 5 bits of exponent and 11 of mantissa, and stands for that number exactly: with exponent e and mantissa m
for 2**(e - 31) * (1 + m / 2048), with e = 0 for 2**-30 * m / 2048. A token holds the order behind that of its weight,
so that one which cannot be chosen has an order, too.
"""

import triton
import triton.language as tl

LARGEST_ORDER = tl.constexpr(65534)
NOTHING = tl.constexpr(0)
"""What a token holds that cannot be chosen."""
BEHIND_ALL = tl.constexpr(65536)
"""What no token holds."""


@triton.jit
def order_of(weight):
    """Orders of float32 weights from 0 to 1. NaN is largest."""
    bits = weight.to(tl.int32, bitcast=True)
    # Rounded, so that sums of many are not moved to one side.
    normal = (bits + ((1 << 11) - (96 << 23))) >> 12
    small = (tl.minimum(weight, 2.0**-30) * (2.0**41) + 0.5).to(tl.int32)
    order = tl.where(weight < 2.0**-30, small, normal)
    order = tl.minimum(tl.maximum(order, 0), LARGEST_ORDER)
    return tl.where(weight == weight, order, LARGEST_ORDER)


@triton.jit
def held_order(order):
    """What a token of this order holds."""
    return order + 1


@triton.jit
def value_of(held):
    """The weight that what a token holds stands for."""
    order = held - 1
    bits = (order + (96 << 11)) << 12
    return tl.where(order < 2048, order.to(tl.float32) * 2.0**-41, bits.to(tl.float32, bitcast=True))
