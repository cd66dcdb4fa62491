# SPDX-License-Identifier: Apache-2.0
"""Memory of the key-value cache in `model.generate`: bytes as they are allocated, beside transformers' own caches."""

import ctypes
import gc
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, QuantizedCache

from aqua_attention.attach.apply import Attachment
from aqua_attention.bench.held import held_by_part, storage_bytes
from aqua_attention.cache.cache import AquaCache
from aqua_attention.calibration.projections import Projections
from aqua_attention.config import AquaConfig
from aqua_attention.errors import AquaError
from aqua_attention.evaluate.generation import GREEDY
from aqua_attention.model.capture import input_device
from aqua_attention.model.limits import check_tokens

NEW_TOKENS = 8
PREFILL_CHUNK = 512
"""Tokens of the prompt processed at once, so that activations do not hide the cache in the peak."""


def measure_memory(
    model: PreTrainedModel,
    projections: Projections,
    configs: Sequence[AquaConfig],
    *,
    length: int = 8192,
    batch: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Generate a few tokens after random ones until `length` are in the cache, with each cache in turn.

    Returns:
        `{"length", "batch", "dtype", "rows": [...]}`; a row for "DynamicCache", for transformers' "QuantizedCache" in
        int8 and int4 (or `absent`: why it does not run here) and for each configuration: `setting` (a name, or the
        AquaConfig's fields, with `effective_ratio`), `bytes` (storages that the cache holds at the end, each once),
        `ratio` (to DynamicCache), `peak_bytes` (the most that the run added to this process, or on a GPU to what was
        allocated; None where the system does not tell), `peak_ratio`. Where tokens are chosen (AQUA-Select) also the
        bytes of its parts, see `held_by_part`.

    Raises:
        AquaError: too short, longer than the model's positions, projections of another model.
    """
    if length < NEW_TOKENS or batch < 1:
        raise AquaError(f"length is {length} and batch {batch}: it takes {NEW_TOKENS} tokens of one sequence at least")
    check_tokens(model, torch.zeros(1, dtype=torch.long), context=length)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    # The last token that is written is not cached.
    prompt = length - NEW_TOKENS + 1
    tokens = torch.randint(0, vocabulary, (batch, prompt), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(input_device(model))

    dynamic = partial(DynamicCache, config=model.config)
    runs: list[tuple[Any, Callable[[], Any], Attachment | None]] = [("DynamicCache", dynamic, None)]
    for backend, bits in (("hqq", 8), ("quanto", 4)):
        quantized = partial(QuantizedCache, backend, model.config, nbits=bits)
        runs.append((f"QuantizedCache int{bits}", quantized, None))
    for config in configs:
        setting = config.to_dict() | {"effective_ratio": config.effective_ratio}
        ours = Attachment(model, projections, config)
        runs.append((setting, partial(_own, ours, length) if config.chooses_tokens else dynamic, ours))
    rows: list[dict[str, Any]] = []
    _generate(model, tokens[:, :64], dynamic())  # allocators and threads are there afterwards
    for done, (setting, make, attachment) in enumerate(runs):
        progress(done, len(runs))
        try:
            before = memory_in_use(model.device, reset=True)
            with attachment or nullcontext():
                cache = make()
                _generate(model, tokens, cache)
        except (ImportError, ValueError, RuntimeError, AssertionError, TypeError) as error:
            if make is dynamic:
                raise
            rows.append({"setting": setting, "absent": str(error).splitlines()[0]})
            continue
        peak = memory_in_use(model.device)
        added = None if peak is None or before is None else peak - before
        row = {"setting": setting, "bytes": storage_bytes(cache), "peak_bytes": added}
        chooses = attachment is not None and attachment.config.chooses_tokens
        rows.append(row | (held_by_part(cache, length) if chooses else {}))
        del cache
    progress(len(runs), len(runs))
    for row in (row for row in rows if "absent" not in row):
        row["ratio"] = row["bytes"] / rows[0]["bytes"]
        peaks = row["peak_bytes"], rows[0]["peak_bytes"]
        row["peak_ratio"] = peaks[0] / peaks[1] if all(peaks) else None
    return {"length": length, "batch": batch, "dtype": str(model.dtype), "rows": rows}


def _own(attachment: Attachment, length: int) -> AquaCache:
    """The cache that `generate` would take for so many tokens and the one that is not kept: only it has the copy that
    is scored.
    """
    is_tiled = attachment._why_not_automatic() is None
    return attachment.new_cache(length + 1, layout="tiled") if is_tiled else attachment.new_cache()


@torch.no_grad()
def _generate(model: PreTrainedModel, tokens: Tensor, cache: Any) -> None:
    counts = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "prefill_chunk_size": PREFILL_CHUNK}
    given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "past_key_values": cache}
    model.generate(**GREEDY | counts | given, pad_token_id=0)


def memory_in_use(device: torch.device, *, reset: bool = False) -> int | None:
    """Most bytes in use since the last reset, or with `reset` those in use now: of a GPU what torch has allocated, else
    of this process; None where the system does not tell."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    try:
        if reset:
            # What earlier runs have freed goes back to the system, so that it cannot hide what the next one takes.
            gc.collect()
            getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    field = "VmRSS" if reset else "VmHWM"
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
