# SPDX-License-Identifier: Apache-2.0
"""AQUA attention on plain tensors. What users and other packages call:

    LayerPlan            what AQUA does in one layer; `LayerPlan.of` makes one from plain tensors
    Call, attend         attention of a prompt, or of any queries over keys by token
    TiledCache, decode   one decoding step over keys laid out for it
    attention            like `attend`, but queries are rotated and dimensions chosen already
    rotate               the rotation that keys go through
    select_dimensions    which dimensions each query multiplies
    attention_reference  the specification
    choose               which backend takes a call, and why another does not

Names load on first use.
"""

from typing import TYPE_CHECKING

from aqua_attention import lazy

if TYPE_CHECKING:
    from aqua_attention.ops.api import attend as attend
    from aqua_attention.ops.api import attention as attention
    from aqua_attention.ops.api import decode as decode
    from aqua_attention.ops.backend import choose as choose
    from aqua_attention.ops.backend import rotate as rotate
    from aqua_attention.ops.layout import TiledCache as TiledCache
    from aqua_attention.ops.plan import Call as Call
    from aqua_attention.ops.plan import LayerPlan as LayerPlan
    from aqua_attention.ops.reference import attention_reference as attention_reference
    from aqua_attention.ops.select import select_dimensions as select_dimensions

_HOME = {
    "Call": "plan",
    "LayerPlan": "plan",
    "TiledCache": "layout",
    "attend": "api",
    "attention": "api",
    "attention_reference": "reference",
    "choose": "backend",
    "decode": "api",
    "rotate": "backend",
    "select_dimensions": "select",
}

__all__ = sorted(_HOME)

__getattr__ = lazy(__name__, _HOME)
