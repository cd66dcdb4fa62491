# SPDX-License-Identifier: Apache-2.0
"""Kernels for a GPU, one file a kernel. Importing these modules needs triton; nothing else does."""
