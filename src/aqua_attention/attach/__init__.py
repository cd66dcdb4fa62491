# SPDX-License-Identifier: Apache-2.0
"""AQUA in a transformers model: `apply`, which layers it covers, the caches it makes."""
