# SPDX-License-Identifier: Apache-2.0
"""A decoding kernel for CPUs, in C. It is compiled when it is first used, and needs a C compiler then."""
