# SPDX-License-Identifier: Apache-2.0
"""Many measurements in a row, each kept as a record when it is done, so that a stopped run goes on where it was."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from aqua_attention.errors import AquaError
from aqua_attention.evaluate.record import (
    Key,
    Record,
    find_record,
    made_by,
    make_folder,
    now,
    record_path,
    write_record,
)
from aqua_attention.io.state import same_digest
from aqua_attention.model.capture import attention_layers, input_device
from aqua_attention.model.fingerprint import key_weight_digest

Progress = Callable[[int, int], None]
"""Called as progress(done, in all), of whatever a measurement counts: forward passes, windows, answers."""


@dataclass(frozen=True)
class Job:
    """A measurement to make: its record's key, what gives the `result`, and the `provenance` of its projections.

    It is called with what it tells its progress, and with a file beside the record, in which it may keep its state. The
    file goes once there is a record, unless `keeps_state`: then other jobs read it.
    A measurement that makes its projections names them, and their digest, in the result, which go to their own places.
    """

    key: Key
    measure: Callable[[Progress, Path], dict[str, Any]]
    rests_on: dict[str, Any] = field(default_factory=dict)
    keeps_state: bool = False


def run_jobs(
    folder: Path,
    jobs: Sequence[Job],
    facts: dict[str, Any],
    *,
    progress: Callable[[float, int], None] | None = None,
    notice: Callable[[str], None] | None = None,
) -> list[Record]:
    """The records of all jobs, in their order. What `folder` has none of yet is measured, and written as soon as it is.

    A measurement that runs out of memory or is refused is recorded with the reason, and the others go on; when run
    again, such a one is tried again. A damaged record is measured again, and so is one of other weights of the model.
    AquaError where `folder` cannot be written into.

    Args:
        facts: see `facts_of`.
        progress: of the measurements that are not there yet; the first number grows in fractions.
        notice: told about records found, damaged ones, and those of other weights.
    """
    notice = notice or (lambda message: None)
    records: dict[int, Record] = {}
    stale = 0
    for place, job in enumerate(jobs):
        try:
            found = find_record(folder, job.key)
        except AquaError as error:
            notice(f"{error}; it is measured again now")
            found = None
        if found is None or found.error is not None:
            continue
        if same_digest(found.details.get("key_weights"), facts.get("key_weights")):
            records[place] = found
        else:
            stale += 1
    if stale:
        notice(f"{stale} of {len(jobs)} measurements in {folder} are of other weights; they are made again now")
    if records:
        notice(f"{len(records)} of {len(jobs)} measurements are in {folder} already")
    pending = [place for place in range(len(jobs)) if place not in records]
    if pending:
        # Now, not after minutes of work.
        make_folder(record_path(folder, jobs[pending[0]].key).parent)
    for done, place in enumerate(pending):

        def tell(step: int, steps: int, done: int = done) -> None:
            if progress:
                progress(done + step / max(1, steps), len(pending))

        tell(0, 1)
        state = state_path(folder, jobs[place].key)
        records[place] = _measured(jobs[place], facts, tell, state)
        write_record(folder, records[place])
        if records[place].error is None and not jobs[place].keeps_state:
            state.unlink(missing_ok=True)
        tell(1, 1)
    return [records[place] for place in range(len(jobs))]


def state_path(folder: Path, key: Key) -> Path:
    """Where the measurement of `key` may keep its state."""
    return record_path(folder, key).with_suffix(".state")


def _measured(job: Job, facts: dict[str, Any], progress: Progress, state: Path) -> Record:
    started, clock = now(), time.perf_counter()
    outcome, named = {}, {}
    try:
        result = job.measure(progress, state)
        named = {name: result.pop(name) for name in ("projections", "projections_sha256") if name in result}
        outcome = {"result": result}
    except Exception as error:
        if (kind := failure_kind(error)) is None:
            raise
        outcome = {"error": {"kind": kind, "message": (str(error) or type(error).__name__).splitlines()[0]}}
    if outcome.get("error", {}).get("kind") == "out_of_memory":
        # Only now: within the handler above, the error's frames still hold the tensors.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    timing = {"started": started, "seconds": round(time.perf_counter() - clock, 3)}
    return Record.of(job.rests_on | job.key | named | facts | timing | outcome)


def facts_of(model: PreTrainedModel, command: str) -> dict[str, Any]:
    """What a record says of program, machine and model."""
    return made_by(command) | facts_of_model(model)


def facts_of_model(model: PreTrainedModel) -> dict[str, Any]:
    """Where a model is, and what tells its weights from others of its name."""
    device = input_device(model)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "key_weights": key_weight_digest(attention_layers(model))}


def counting(progress: Progress | None, total: int, done: int = 0) -> Callable[[int], None]:
    """A function to be called before each step with its size, and with 0 when all is done; it tells what is done."""

    def step(size: int) -> None:
        nonlocal done
        if progress:
            progress(done, total)
        done += size

    return step


def damaged(what: str) -> AquaError:
    """The error for a model that gives NaN or infinity, with the remedy."""
    return AquaError(f"{what}: its weights are damaged, or the dtype is too narrow (try --dtype float32)")


def check_sizes(**sizes: int | Sequence[int] | None) -> None:
    """Raise AquaError for a number of tokens from which nothing can be predicted; None is none given."""
    for name, given in sizes.items():
        for value in [given] if isinstance(given, int) else given or ():
            if value < 2:
                raise AquaError(f"{name.replace('_', ' ')} is {value}: it must be at least 2 tokens")


def failure_kind(error: Exception) -> str | None:
    """ "out_of_memory", "error" (refused), or None for anything else, which is a defect of AQUA."""
    if isinstance(error, AquaError):
        return "error"
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return "out_of_memory"
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return "out_of_memory" if isinstance(error, RuntimeError) and any(word in str(error) for word in words) else None
