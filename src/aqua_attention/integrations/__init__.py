# SPDX-License-Identifier: Apache-2.0
"""AQUA inside other people's software."""
