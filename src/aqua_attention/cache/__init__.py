# SPDX-License-Identifier: Apache-2.0
"""Caches of rotated keys: growing, of a fixed size, tiled for the decoding kernels; and what they store."""
