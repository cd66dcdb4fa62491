# SPDX-License-Identifier: Apache-2.0
"""What AQUA costs: measurements of a model's output against the same model's dense output."""
