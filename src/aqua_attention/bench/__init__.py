# SPDX-License-Identifier: Apache-2.0
"""What AQUA saves: memory and time against dense baselines, in one run.

Nothing is timed before it is right: each kernel is compared with the reference in float64 on the same data.
"""
