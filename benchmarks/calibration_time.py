#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How long calibration takes for the shape of an 8B model: seconds a window of each of the three passes.

python benchmarks/calibration_time.py                  # on a GPU, random weights in the shape of Llama-3.1-8B
python benchmarks/calibration_time.py --windows 100    # and what so many windows take in all
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch

from aqua_attention.bench.random_llama import make_model
from aqua_attention.calibration import reading
from aqua_attention.calibration.learned import learn
from aqua_attention.calibration.run import CalibrationRun
from aqua_attention.calibration.tuning import tune
from aqua_attention.model.sides import TEXT


class Clock:
    """Times at which windows were done."""

    def __init__(self) -> None:
        self.start, self.done = time.perf_counter(), list[float]()

    def __call__(self, _: int, __: int) -> None:
        """A window is done."""
        torch.cuda.synchronize()
        self.done.append(time.perf_counter())

    @property
    def a_window(self) -> float:
        """Median seconds."""
        return median(after - before for before, after in zip(self.done, self.done[1:], strict=False))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=100, help="how many windows a calibration is said to read")
    parser.add_argument("--measured", type=int, default=16, help="how many are measured in each pass")
    parser.add_argument("--context", type=int, default=2048)
    given = parser.parse_args()
    model = make_model()
    # As many are held out as of many windows.
    reading.LEAST_READ, reading.HELD_SHARE = given.measured, 1
    count = reading.MOST_HELD + given.measured
    windows = torch.randint(model.config.vocab_size, (count, given.context), generator=torch.Generator().manual_seed(0))
    clock = Clock()
    found = CalibrationRun(model, progress=clock).learn(windows[: given.measured], {TEXT}, {})
    print(f"{torch.cuda.get_device_name()}, windows of {given.context}")
    total = show("singular vectors", clock, 16)
    passes: list[tuple[str, Callable]] = [("learned", learn), ("tuned", tune)]
    for name, improve in passes:
        torch.cuda.reset_peak_memory_stats()
        clock = Clock()
        found = improve(model, found, windows, progress=clock)
        if improve is tune and not all(before > 0 for before, _ in found.calibration["tuned"]["kl"].values()):
            raise SystemExit("dropping dimensions changed nothing, so there was nothing to tune and to time")
        total += show(name, clock, given.windows)
    print(f"in all {total / 60:.1f} minutes for {given.windows} windows")


def show(name: str, clock: Clock, windows: int) -> float:
    """Print a pass, and return the seconds that so many windows take."""
    torch.cuda.synchronize()
    end = time.perf_counter()
    fixed = clock.done[0] - clock.start - clock.a_window + end - clock.done[-1]
    total = max(0.0, fixed) + windows * clock.a_window
    peak = torch.cuda.max_memory_allocated() / 2**30
    each = f"{clock.a_window:.2f} s a window, {fixed:.0f} s before and after"
    print(f"{name}: {each}, {total:.0f} s for {windows} windows, peak {peak:.0f} GiB", flush=True)
    return total


if __name__ == "__main__":
    main()
