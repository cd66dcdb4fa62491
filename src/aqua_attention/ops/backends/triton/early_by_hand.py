# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Starting early, for kernels in Gluon: see `token_arguments.start_early`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def start_early(EARLY: gl.constexpr):
    """Wait for the kernel before this one, and let the next be put on the GPU."""
    if EARLY:
        gl.inline_asm_elementwise(
            "griddepcontrol.wait; griddepcontrol.launch_dependents; // dummy $0",
            "=r",
            [],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )
