# SPDX-License-Identifier: Apache-2.0
"""AQUA attention on plain tensors: which dimensions (select), the specification (reference), the fast path."""
