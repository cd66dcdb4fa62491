# SPDX-License-Identifier: Apache-2.0
"""How an attention function gets into a transformers model, and out again without a trace.

transformers looks attention up by a name in the model's config, in two tables: one for the function and one for
the mask that it needs. We register a fresh name in both, point the model at it, and take everything back.
"""

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from aqua_attention.errors import AquaError
from aqua_attention.model.copies import is_ours, name_former, with_parts
from aqua_attention.ops.api import attention
from aqua_attention.ops.mask import HIDDEN, bidirectional, window_codes
from aqua_attention.ops.plan import Call
from aqua_attention.ops.select import without_autocast

NAME_PREFIX = "aqua-"
CHANGES = threading.RLock()
"""Held while an attention function is put into a model or taken out."""
_numbers = itertools.count(1)
_looking: dict[int, int] = {}
"""Threads that look at a model's attention, by the id of each of its configs."""


def install(
    model: PreTrainedModel,
    attention: Callable[..., Any],
    mask: Callable[..., Tensor | None],
    configs: Sequence[PreTrainedConfig] | None = None,
) -> tuple[str, Callable[[], None]]:
    """Send every attention call of `model` to `attention`; returns the name it runs under, and how to undo it.

    Args:
        attention: called as transformers calls its attention functions: `(module, query, key, value,
            attention_mask, dropout=, scaling=, **kwargs) -> (output [batch, queries, heads, dim], None)`.
        mask: builds `attention_mask`, see `mask_builder`.
        configs: only the calls of modules that have one of these configs; the others stay as they are.

    An AquaError where the model does not use transformers' attention interface, or is not its own (see
    `check_detached`); nothing is changed then.
    """
    name = f"{NAME_PREFIX}{next(_numbers)}"
    parts = _parts(model)
    if refused := next((part for part in parts if not part._can_set_attn_implementation()), None):
        raise AquaError(
            f"{type(refused).__name__} does not use transformers' attention interface, so its attention cannot be "
            "replaced: use a model class that does (Llama, Mistral, Qwen, Gemma, OPT, GPT-NeoX, BERT, CLIP, SigLIP, "
            "ViT, ...)"
        )
    chosen = [part.config for part in parts] if configs is None else configs
    before: list[tuple[PreTrainedConfig, str | None]] = []

    def undo() -> None:
        with CHANGES:
            for config, implementation in before:
                if configs is None:
                    config._attn_implementation = implementation
                else:  # not those of the config's own parts, as the setter would
                    config._attn_implementation_internal = implementation
            AttentionInterface._global_mapping.pop(name, None)
            AttentionMaskInterface._global_mapping.pop(name, None)
            end_copies()

    with CHANGES:
        _check_own(chosen)
        before += [(config, config._attn_implementation) for config in chosen]
        # Parts of the config that no module has get the name, too, where all have it.
        end_copies = name_former(name, chosen if configs else [part for each in chosen for part in with_parts(each)])
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, mask)
        try:
            if configs is None:
                model.set_attn_implementation(name)
            for config, _ in before:
                config._attn_implementation_internal = name
        except BaseException:
            undo()
            raise
    return name, undo


def attention_function(
    name: str, attend: Callable[[nn.Module, Call, bool, dict[str, Any]], Tensor]
) -> Callable[..., Any]:
    """An attention function for `install`, which has `attend(module, call, causal, given)` compute the output.

    The call has no window yet; `given` are the keyword arguments of the model `name`. An AquaError for a call that AQUA
    would compute wrongly.
    """

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any
    ) -> tuple[Tensor, None]:
        causal, scaling = given.get("is_causal"), given.get("scaling")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        unknown = None if SCORE_ARGUMENTS.isdisjoint(given) else _unknown(given)
        if unknown:
            raise AquaError(f"{name} passes {unknown} to its attention, which AQUA does not support")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        mask, options = as_aqua_mask(attention_mask), (given.get("softcap"), given.get("s_aux"))
        if mask is not None and mask.shape[-1] == 1 < key.shape[2]:
            raise AquaError(
                f"{name} makes a mask of 1 token for the {key.shape[2]} of its cache, which hides no padding, without "
                "AQUA either: give it rows of the same length, or use_cache=False"
            )
        call = Call(query, key, value, mask, 0, 0, scaling, *options)
        return attend(module, call, causal, given).transpose(1, 2).contiguous(), None

    return attention


SCORE_ARGUMENTS = frozenset(
    ("position_bias", "alibi", "head_mask", "sinks", "indices", "block_indices", "cu_seq_lens_q")
)
"""Arguments with which a model changes scores or visibility in ways that AQUA does not know."""


def _unknown(given: dict[str, Any]) -> str | None:
    return next((name for name in sorted(SCORE_ARGUMENTS) if given.get(name) is not None), None)


def check_detached(model: PreTrainedModel) -> None:
    """Raise AquaError where the attention of `model` is not its own, or another thread is `looking_at` it."""
    _check_own([part.config for part in _parts(model)])


@contextmanager
def looking_at(model: PreTrainedModel) -> Iterator[None]:
    """While open, no other thread can put an attention function into `model`; an AquaError as `check_detached`."""
    with CHANGES:
        check_detached(model)
        new = {id(part.config) for part in _parts(model)} - _looking.keys()
        _looking.update(dict.fromkeys(new, threading.get_ident()))
    try:
        yield
    finally:
        with CHANGES:
            for each in new:
                del _looking[each]


def _parts(model: nn.Module) -> list[PreTrainedModel]:
    return [part for part in model.modules() if isinstance(part, PreTrainedModel)]


def _check_own(configs: Sequence[PreTrainedConfig]) -> None:
    with CHANGES:
        here = threading.get_ident()
        if any(_looking.get(id(config), here) != here for config in configs):
            raise AquaError(
                "another thread is calibrating this model, or attaching AQUA to it: wait until it is done, and let one "
                "thread attach AQUA for all"
            )
        if any(map(is_ours, configs)):
            raise AquaError("AQUA is attached to this model already: leave that `apply`, or call its detach(), first")


def mask_builder(
    sink: int, recent: int, min_length: int = 0, exact_window: int | None = None
) -> Callable[..., Tensor | None]:
    """A mask function for transformers: None where causal order says it all, else boolean, or codes.

    The window, and which queries are short, are laid down here because only here are positions, padding and cache
    offsets known together. Where a query sees all tokens of its sequence so far, their number says whether it is short.

    `exact_window` is the size of sliding windows in which every dimension is multiplied: a boolean mask will do there.
    """

    def build(
        batch_size: int, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **given: Any
    ) -> Tensor | None:
        q_offset, kv_offset = given.get("q_offset", 0), given.get("kv_offset", 0)
        if q_length == kv_length == 1 and isinstance(q_offset, Tensor):
            return None  # a decoding step of layers that know themselves what is visible
        begins_late = isinstance(kv_offset, Tensor) or kv_offset > 0
        needs_codes = min_length > 0 and (begins_late or given.get("local_size") is not None)
        # A static cache, whose empty end must be hidden; transformers thinks of that only where it compiles.
        if (q_length == 1 and isinstance(q_offset, Tensor)) or (needs_codes and begins_late):
            given["allow_is_causal_skip"] = False
        sizes = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length}
        visible: Tensor | None = sdpa_mask(**sizes, attention_mask=attention_mask, **given)
        is_exact = exact_window is not None and given.get("local_size") == exact_window
        if visible is None or is_exact or (sink + recent == 0 and not needs_codes):
            return visible
        device = visible.device
        query_positions = (torch.arange(q_length, device=device) + q_offset).expand(batch_size, -1)
        key_positions = (torch.arange(kv_length, device=device) + kv_offset).expand(batch_size, -1)
        if attention_mask is not None:
            # Count real tokens, so that padding on either side takes no place in the window.
            counted = attention_mask.to(device=device, dtype=torch.long).cumsum(-1) - 1
            last = counted.shape[-1] - 1
            query_positions = counted.gather(-1, query_positions.clamp(max=last))
            key_positions = counted.gather(-1, key_positions.clamp(max=last))
        elif q_length == kv_length and not (isinstance(q_offset, Tensor) or begins_late or _in_chunks(given)):
            query_positions = key_positions = _packed_positions(visible)
        return window_codes(visible, query_positions, key_positions, sink, recent, min_length)

    return build


def _in_chunks(given: dict[str, Any]) -> bool:
    """Whether a mask is of chunks, as in Llama 4: the first token of one sees none before it either."""
    chunk = getattr(given.get("config"), "attention_chunk_size", None)
    return chunk is not None and given.get("local_size") == chunk


def _packed_positions(visible: Tensor) -> Tensor:
    """Places of tokens in their own sequence, [batch, tokens], of rows that may hold several, one after the other.

    A token that does not see the one before it begins a sequence; so it is in a sliding window, too.
    """
    links = visible[:, 0].diagonal(-1, 1, 2)
    begins = torch.nn.functional.pad(~links, (1, 0), value=True)
    index = torch.arange(visible.shape[-1], device=visible.device)
    return index - torch.where(begins, index, 0).cummax(-1).values


def as_aqua_mask(mask: Tensor | None) -> Tensor | None:
    """A mask that came through a model, in the form of `ops.mask`; a user's own 4-D additive mask becomes boolean.

    An AquaError for one with values other than zero and minus infinity.
    """
    if mask is None or not mask.is_floating_point():
        return mask
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    if not bool((hidden | (mask == 0)).all()):
        raise AquaError(
            "the attention mask adds a bias to the scores: AQUA supports only masks that hide tokens "
            "(0 and the smallest number of the dtype, or boolean)"
        )
    return ~hidden


def directed(call: Call, causal: bool, sink: int = 0) -> Call:
    """The call with a mask, if it has none and is not causal. `sink` tokens of the mask are in the exact window."""
    if causal or call.mask is not None:
        return call
    mask = bidirectional(call.query.shape[2], call.key.shape[2], sink=sink, device=call.query.device)
    return call._replace(mask=mask)


def attend_dense(call: Call) -> Tensor:
    """Dense attention under a mask as of AQUA's, with the result of `ops.api.attention`."""
    query, key, value, mask = call[:4]
    if mask is None and query.shape[2] > 1:
        # Keys behind the queries are the empty end of a static cache.
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    options = call.options | {"mask": None if mask is None else mask != HIDDEN}
    with without_autocast(query.device.type):
        return attention(query.to(value.dtype), key.to(value.dtype), value, None, **options)
