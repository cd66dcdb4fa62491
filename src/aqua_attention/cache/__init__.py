# SPDX-License-Identifier: Apache-2.0
"""Caches of rotated keys: growing, of a fixed size, tiled for the decoding kernels; and what they store."""

from typing import TYPE_CHECKING

from aqua_attention import lazy

if TYPE_CHECKING:
    from aqua_attention.cache.cache import AquaCache as AquaCache

__getattr__ = lazy(__name__, {"AquaCache": "cache"})
