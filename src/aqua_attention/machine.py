# SPDX-License-Identifier: Apache-2.0
"""What was measured of a machine once: from which length on choosing dimensions, or tokens, pays.

`aqua bench breakeven` writes a profile for one device, shape of attention and dtype; `AquaConfig(min_length="auto")` is
turned into a number by it when AQUA is applied to a model.
"""

import dataclasses
import json
import os
import platform
import re
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from aqua_attention.config import AUTO, AquaConfig
from aqua_attention.errors import AquaError
from aqua_attention.io.files import cache_folder, write_json

FORMAT = 2
"""1 was measured with keys and values in the processor's caches, and against k = d of rotated keys."""
MEASURED = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16, torch.float16)}
"""Dtypes that there are profiles for."""

CHOICE = ("select_p", "select_tokens", "score_bits")
"""Knobs that must be as they were measured, where tokens are chosen."""
BUSY = 0.25
"""Share of the processors that, when busy already, makes times wrong."""


class Shape(NamedTuple):
    """What a profile is for: one attention layer on one device."""

    device: torch.device
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        """Such as "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")

    def check_heads(self) -> None:
        """Raise AquaError where query heads do not divide into groups."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if min(heads, kv_heads) < 1 or heads % kv_heads:
            raise AquaError(f"{heads} query heads do not divide into {kv_heads} key-value heads: give a multiple")

    @property
    def facts(self) -> dict[str, Any]:
        """What results say of it."""
        sizes = {"heads": self.num_attention_heads, "groups": self.num_key_value_heads, "head_dim": self.head_dim}
        return sizes | {"dtype": str(self.dtype)}

    @property
    def command(self) -> str:
        """What measures it."""
        return (
            f"aqua bench breakeven --device {self.device} --heads {self.num_attention_heads} "
            f"--groups {self.num_key_value_heads} --head-dim {self.head_dim} --dtype {self.dtype_name}"
        )


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's own name."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    with suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1].strip()
    return platform.processor() or platform.machine()


def warn_of_load(remedy: str) -> bool:
    """Warn where the processors are busy before anything is timed, and say whether they are.

    Args:
        remedy: what to do about it.
    """
    if not hasattr(os, "getloadavg"):
        return False
    load, processors = os.getloadavg()[0], os.cpu_count() or 1
    is_busy = load > max(0.5, BUSY * processors)
    if is_busy:
        busy = f"this machine is busy (load {load:.1f} in the last minute, {processors} processors)"
        warnings.warn(f"{busy}, and times will be wrong; {remedy}", stacklevel=3)
    return is_busy


def profile_path(shape: Shape) -> Path:
    """Where the profile is kept: `profiles` in the user's cache folder, or in `AQUA_CACHE_DIR`."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name(shape.device).lower()).strip("-")
    size = f"{shape.num_attention_heads}q-{shape.num_key_value_heads}kv-{shape.head_dim}d-{shape.dtype_name}"
    return cache_folder("profiles") / f"breakeven-{name}-{size}.json"


def write_profile(
    shape: Shape,
    thresholds: dict[float, int | None],
    lengths: Sequence[int],
    facts: dict[str, Any],
    selects: Sequence[dict[str, Any]] = (),
) -> Path:
    """Keep what was measured, in place of an earlier profile of the same shape; an AquaError where it cannot be kept.

    Args:
        thresholds: for each k_ratio, the number of tokens from which on it is faster than all dimensions; None: not at
            the `lengths` that were measured.
        facts: how it was measured, kept for people who read the file.
        selects: the same of settings that choose tokens, with `k_ratio`, `select_p`, `select_tokens`, `score_bits` and
            `min_length`; what else they say is left out, and so are those that no `AquaConfig` can have.
    """
    path = profile_path(shape)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AquaError(f"cannot make {path.parent}: {error.strerror}; set AQUA_CACHE_DIR to another folder") from error
    rows = [{"k_ratio": ratio, "min_length": length} for ratio, length in sorted(thresholds.items())]
    profile = {"format": FORMAT, "device": device_name(shape.device), "thresholds": rows, "lengths": list(lengths)}
    choices = [each for each in selects if each["select_p"] is not None or each["select_tokens"] is not None]
    if choices:
        profile["selects"] = [{name: each[name] for name in ("k_ratio", *CHOICE, "min_length")} for each in choices]
    write_json(path, profile | facts)
    return path


def resolved(config: AquaConfig, shapes: Iterable[Shape]) -> AquaConfig:
    """The configuration with a number for `min_length`: for "auto" the largest that the profiles of the layers say.

    A profile knows some k_ratios; the next larger one of these counts, and under `logit_error`, which may choose many
    dimensions, the largest: a query that could have chosen a little earlier loses less than one that does too early.
    A choice of tokens must be as it was measured, and its k_ratio counts likewise. Without a profile that tells, an
    AquaError says what to do.
    """
    if config.min_length != AUTO:
        return config

    known = (_look_up(config, shape) for shape in set(shapes))
    return dataclasses.replace(config, min_length=max(known, default=0))


def _look_up(config: AquaConfig, shape: Shape) -> int:
    """0 where every dimension is multiplied anyway."""
    is_whole = config.logit_error is None and config.selected_dims(shape.head_dim) >= config.kept_dims(shape.head_dim)
    if is_whole and not config.chooses_tokens:
        return 0
    auto = 'min_length is "auto"'
    if shape.device.type not in ("cpu", "cuda"):
        raise AquaError(f"{auto}: there are profiles for cpu and cuda, not for {shape.device.type}, give a number")
    if shape.dtype not in MEASURED[shape.device.type]:
        raise AquaError(f"{auto}: there are no profiles for {shape.dtype} on {shape.device.type}, give a number")
    path, any_ratio = profile_path(shape), config.logit_error is not None
    remedy = f"run: {shape.command}" + ("" if any_ratio else f" --k-ratio {config.k_ratio!r}") + _choice(config)
    what = "choosing tokens" if config.chooses_tokens else "choosing dimensions"
    try:
        profile = json.loads(path.read_text())
        rows = profile.get("selects", []) if config.chooses_tokens else profile["thresholds"]
        if config.chooses_tokens:
            rows = [row for row in rows if all(row[name] == getattr(config, name) for name in CHOICE)]
        known = {float(row["k_ratio"]): row["min_length"] for row in rows}
        numbers = [length for length in [*known.values(), *profile["lengths"]] if length is not None]
        if profile["format"] != FORMAT or not all(type(length) is int and length >= 0 for length in numbers):
            raise ValueError
    except FileNotFoundError:
        raise AquaError(f"{auto}, but this machine has no profile of such layers ({path}): {remedy}") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise AquaError(f"the machine profile {path} is damaged or of another version: {remedy}") from None
    measured = sorted(ratio for ratio in known if any_ratio or ratio >= config.k_ratio - 1e-9)
    if not measured:
        choice = f" with {config.choice} and score_bits={config.score_bits}" if config.chooses_tokens else ""
        raise AquaError(f"the machine profile {path} knows no k_ratio of {config.k_ratio:g} or more{choice}: {remedy}")
    length = known[measured[-1 if any_ratio else 0]]
    if length is None:
        raise AquaError(
            f"{auto}, but {what} was not faster up to {max(profile['lengths'])} tokens, the longest in "
            f"{path}: give a number of tokens, or measure longer ones ({remedy} --lengths FIRST..LAST)"
        )
    return int(length)


def _choice(config: AquaConfig) -> str:
    """The options by which a choice of tokens is measured; empty: there is none."""
    if not config.chooses_tokens:
        return ""
    name = "select_p" if config.select_p is not None else "select_tokens"
    return f" --{name.replace('_', '-')} {getattr(config, name)!r} --score-bits {config.score_bits}"
