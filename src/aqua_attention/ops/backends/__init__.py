# SPDX-License-Identifier: Apache-2.0
"""Implementations of AQUA attention; `ops.backend` chooses among them, and they never import each other."""
