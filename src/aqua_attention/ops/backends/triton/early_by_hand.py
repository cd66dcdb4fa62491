# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Starting early, for kernels in Gluon: see `token_arguments.start_early`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def start_early(EARLY: gl.constexpr):
    """Wait for the kernel before this one, and with 2 let the next be put on the GPU."""
    if EARLY:
        LET_NEXT: gl.constexpr = " griddepcontrol.launch_dependents;" if EARLY == 2 else ""
        gl.inline_asm_elementwise(
            "griddepcontrol.wait;" + LET_NEXT + " // dummy $0",
            "=r",
            [],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )
