# SPDX-License-Identifier: Apache-2.0
"""From which length on choosing dimensions, or tokens, pays: a decoding step of one layer over lengths, and theory."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from aqua_attention.bench.choosing import Choosing
from aqua_attention.bench.problem import OURS, Problem
from aqua_attention.config import AquaConfig
from aqua_attention.errors import AquaError
from aqua_attention.machine import MEASURED, Shape, device_name, warn_of_load, write_profile

DTYPES = {device: tuple(str(kind).removeprefix("torch.") for kind in kinds) for device, kinds in MEASURED.items()}
"""What the kernels of a device are measured in, the default first."""
LENGTHS, QUICK_LENGTHS = "64..65536", "64..4096"
READ_SHARE = 0.2
"""What approximate scores of 32 dimensions would read of a text of 8192 tokens at p 0.95, see docs/results/basis.md."""
PAPER_RATIO, PAPER_LENGTHS = 0.75, (64, 1024)


def grouped_breakeven(head_dim: int, k: int, group: int = 1) -> float:
    """The length at which rotating is paid for by products left out, d^2 (1 + 1/G) / (d - k): in the paper G is 1.

    For each token and key-value head, G query heads and a key are rotated, by d^2 (G + 1) multiply-adds. With L cached
    tokens, the queries save G (d - k) L. Sorting, and reading instead of multiplying, are left out. Dense keys are not
    rotated; on a GPU they are, and the choice alone has to pay.
    """
    return head_dim**2 * (1 + 1 / group) / (head_dim - k)


def crossing(lengths: Sequence[int], ours: Sequence[float], other: Sequence[float]) -> float | None:
    """The length from which on `ours` stays faster than `other`; None where it is not at the longest one measured.

    Between two measured lengths, the difference is taken to be a straight line.
    """
    gains = [theirs - mine for mine, theirs in zip(ours, other, strict=True)]
    last = max((index for index, gain in enumerate(gains) if gain <= 0), default=-1)
    if last == len(gains) - 1:
        return None
    if last < 0:
        return float(lengths[0])
    share = -gains[last] / (gains[last + 1] - gains[last])
    return lengths[last] + share * (lengths[last + 1] - lengths[last])


def read_lengths(text: str) -> list[int]:
    """The lengths of "64..65536": the first, doubled until the last; an AquaError if it is written in another way."""
    first, _, last = text.partition("..")
    if not (first.isdecimal() and last.isdecimal() and 16 <= int(first) < int(last)):
        raise AquaError(f"lengths is {text!r}: it must be FIRST..LAST, such as {LENGTHS}, from 16 tokens on")
    doublings = int(math.log2(int(last) / int(first)))
    return [int(first) << power for power in range(doublings + 1)]


def measure_breakeven(
    shape: Shape,
    *,
    k_ratios: tuple[float, ...] = (0.75, 0.5),
    lengths: Sequence[int],
    progress: Callable[[int, int], None] = lambda done, total: None,
    sink: int = OURS.sink,
    recent: int = OURS.recent,
    choosing: Sequence[Choosing] = (),
    read_share: float = READ_SHARE,
) -> dict[str, Any]:
    """Check and time a step (rotate, choose, append, attend) of one sequence: at each k, at k = d as `min_length` does
    it (on a CPU without rotation), and the fastest dense attention with its append; find where they cross.

    So are steps that choose tokens (AQUA-Select), each also as `min_length` switches from it. All is kept as this
    machine's profile, unless it was busy when measuring began.

    Args:
        k_ratios: below 1.
        lengths: rising, in tokens, the new one included.
        sink, recent: the exact window.
        choosing: settings that choose tokens.
        read_share: share of the tokens that holds the softmax of `select_p`: keys are made so.

    Returns:
        `{"device", ..., "rows", "breakeven", "selects", "profile"}`. A row a length: `length`, `dense` and `whole`
        (seconds; whole is k = d), `dense_name`, `aqua` (seconds, in the order of k_ratios). A break-even for each
        k_ratio: `k`, `whole` and `dense` (`crossing` with these, or None), `paper` and `theory` (lengths),
        `paper_experiment` (the range of whole / aqua over the lengths of the paper's first experiment, at its k_ratio,
        else None). The profile is its path, or None where none is kept. Of `choosing`, a row has `select` and
        `select_short` (seconds, the latter below `min_length`) and `read` (shares of the tokens), and "selects" is what
        `select_crossings` says of each.

    Raises:
        AquaError: a device, shape, dtype or k_ratio that cannot be measured, a kernel that is wrong, or no place for
            the profile.
    """
    if shape.dtype_name not in DTYPES.get(shape.device.type, ()):
        known = ", or ".join(f"{device} with {' or '.join(names)}" for device, names in DTYPES.items())
        raise AquaError(f"device is {shape.device.type} and dtype {shape.dtype}: it must be {known}")
    if shape.device.type == "cuda" and not torch.cuda.is_available():
        raise AquaError("device is cuda: there is no CUDA GPU here; measure the processor with cpu")
    shape.check_heads()
    # Also refuses what is no ratio at all.
    counts = [AquaConfig(k_ratio=ratio).selected_dims(shape.head_dim) for ratio in k_ratios]
    if not counts or max(counts) >= shape.head_dim:
        raise AquaError(
            f"k_ratio is {', '.join(f'{r:g}' for r in k_ratios)}: each must leave out some dimensions, choose less"
        )
    is_busy = warn_of_load("no profile will be kept: measure again when the machine has been idle for a minute")
    rows = []
    for done, length in enumerate(lengths):
        progress(done, len(lengths))
        rows.append(_row(shape, length, k_ratios, sink, recent, choosing, read_share))
    progress(len(lengths), len(lengths))
    found = [_breakeven(shape, rows, index, ratio) for index, ratio in enumerate(k_ratios)]
    ours = replace(OURS, sink=sink, recent=recent)
    threads = torch.get_num_threads() if shape.device.type == "cpu" else None
    facts = shape.facts | {"sink": ours.sink, "recent": ours.recent, "threads": threads, "torch": torch.__version__}
    thresholds = {row["k_ratio"]: None if row["whole"] is None else math.ceil(row["whole"]) for row in found}
    selects = [each._asdict() | select_crossings(rows, index) for index, each in enumerate(choosing)]
    facts |= {"read_share": read_share} if choosing else {}
    profile = None if is_busy else str(write_profile(shape, thresholds, lengths, facts, selects))
    measured = {"rows": rows, "breakeven": found, "selects": selects, "profile": profile}
    return {"device": device_name(shape.device), "lengths": list(lengths)} | facts | measured


def _breakeven(shape: Shape, rows: list[dict[str, Any]], index: int, ratio: float) -> dict[str, Any]:
    """Of the k_ratio with this index; see `measure_breakeven`."""
    k, (low, high) = AquaConfig(k_ratio=ratio).selected_dims(shape.head_dim), PAPER_LENGTHS
    lengths, ours = [row["length"] for row in rows], [row["aqua"][index] for row in rows]
    gains = [row["whole"] / row["aqua"][index] for row in rows if low <= row["length"] <= high]
    crossings = {other: crossing(lengths, ours, [row[other] for row in rows]) for other in ("whole", "dense")}
    group = shape.num_attention_heads // shape.num_key_value_heads
    paper, theory = (grouped_breakeven(shape.head_dim, k, queries) for queries in (1, group))
    experiment = [min(gains), max(gains)] if gains and ratio == PAPER_RATIO else None
    told = {"paper": paper, "theory": theory, "paper_experiment": experiment}
    return {"k_ratio": ratio, "k": k} | crossings | told


def select_crossings(rows: Sequence[dict[str, Any]], index: int) -> dict[str, Any]:
    """From which length on the setting of this index that chooses tokens is faster than others, and stays so.

    Returns:
        `dense`, `dimensions` and `short` (lengths, or None: not at those measured): than dense attention, than the
        fastest way without a choice of tokens (k = d, or one of the k_ratios), than itself below `min_length`.
        `min_length`: the last one as a whole number. `slowest`: with that, the most that a step takes of the fastest
        way without; 1 or less: it is never slower.
    """
    lengths, ours = [row["length"] for row in rows], [row["select"][index] for row in rows]
    short = [row["select_short"][index] for row in rows]
    without = [min(row["whole"], *row["aqua"]) for row in rows]
    others = {"dense": [row["dense"] for row in rows], "dimensions": without, "short": short}
    found: dict[str, Any] = {name: crossing(lengths, ours, other) for name, other in others.items()}
    switch = None if found["short"] is None else math.ceil(found["short"])
    is_short = [switch is None or length < switch for length in lengths]
    taken = [below if is_below else above for is_below, below, above in zip(is_short, short, ours, strict=True)]
    slowest = max(mine / other for mine, other in zip(taken, without, strict=True))
    return found | {"min_length": switch, "slowest": slowest}


def _row(
    shape: Shape,
    length: int,
    k_ratios: tuple[float, ...],
    sink: int,
    recent: int,
    choosing: Sequence[Choosing] = (),
    read_share: float = READ_SHARE,
) -> dict[str, Any]:
    """One length, by the benchmark of the device."""
    window: dict[str, Any] = {"sink": sink, "recent": recent}
    selects = tuple(each.at(length, **window, min_length=least) for each in choosing for least in (0, length + 1))
    if shape.device.type == "cpu":
        from aqua_attention.bench.decode_cpu import measure_decode_cpu

        # Below `min_length` nothing is rotated: that is k = d on a CPU.
        measured = measure_decode_cpu(
            shape,
            k_ratios=k_ratios,
            length=length,
            parts=("step",),
            short=True,
            **window,
            selects=selects,
            heavy=read_share,
        )
    else:
        try:
            from aqua_attention.bench.decode import measure_decode
        except ModuleNotFoundError as error:
            raise AquaError(
                "aqua bench breakeven needs triton on a GPU, which CUDA builds of torch bring along: pip install triton"
            ) from error
        with torch.cuda.device(shape.device):
            measured = measure_decode(shape, batch=1, length=length, k_ratios=(1.0, *k_ratios), **window)["rows"]
            if selects:
                from aqua_attention.bench.select_gpu import measure_select

                problem = Problem.random(shape, batch=1, length=length)
                measured += measure_select(problem, list(selects), heavy=read_share)
        measured = [row for row in measured if "absent" not in row]
    dense = {row["name"]: row["step_seconds"] for row in measured if row["k_ratio"] is None}
    if not dense:
        raise AquaError(
            f"no dense attention ran at {length} tokens, so there is nothing to compare with: choose other --lengths"
        )
    ours, chosen = ([row for row in measured if ("read" in row) is reads] for reads in (False, True))
    whole, *aqua = (row["step_seconds"] for row in ours if row["k_ratio"] is not None)
    fastest = min(dense, key=dense.__getitem__)
    row = {"length": length, "dense": dense[fastest], "dense_name": fastest, "whole": whole, "aqua": aqua}
    if chosen:
        row |= {
            "select": [each["step_seconds"] for each in chosen[::2]],
            "read": [each["read"] for each in chosen[::2]],
        }
        row["select_short"] = [each["step_seconds"] for each in chosen[1::2]]
    return row
