# SPDX-License-Identifier: Apache-2.0
"""Our files: written whole or not at all, checked when they are read."""
