# SPDX-License-Identifier: Apache-2.0
"""A decoding step for CPUs, in C. It is compiled when it is first used, and needs a C compiler then."""
