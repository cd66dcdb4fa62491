# SPDX-License-Identifier: Apache-2.0
"""A transformers model from inside: its attention interface, its layers, its text and image sides, its fingerprint."""
