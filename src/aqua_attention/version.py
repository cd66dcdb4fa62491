# SPDX-License-Identifier: Apache-2.0
"""The version of this library."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("aqua-attention")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

TESTED = {"torch": ("2.13",), "transformers": ("5.23",)}
"""Versions that the tests run with, those of constraints.txt."""
