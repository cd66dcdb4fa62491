# SPDX-License-Identifier: Apache-2.0
"""What AQUA saves: memory and time against dense baselines, in one run."""
