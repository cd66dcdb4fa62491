#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Ask a question about a long document: dense attention, then AQUA, with the time and memory of each.

    python examples/long_document.py
    python examples/long_document.py --file notes.txt --question "Who wrote this?" --preset fast --preset small

The default model (SmolLM2-135M, 98 MB) is fetched once, as `aqua demo` does. The projections are calibrated once, in
about two minutes on two CPU cores, and kept in a file. All figures are measured in this run.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

import aqua_attention as aqua
from aqua_attention.bench.memory import memory_in_use, storage_bytes
from aqua_attention.cli.terminal import print_table
from aqua_attention.evaluate.generation import encode_prompt, generate
from aqua_attention.io.progress import progress_bar

CONSOLE = Console(highlight=False, soft_wrap=True)
QUESTION = "What is None used for?"


class Measured(NamedTuple):
    """An answer, and what it took; `peak_bytes` is None where the system does not tell."""

    answer: str
    prompt_seconds: float
    seconds_per_token: float
    cache_bytes: int
    peak_bytes: int | None


class Clock:
    """A streamer that notes when each token comes."""

    def __init__(self) -> None:
        """Start now."""
        self.times = [time.perf_counter()]

    def put(self, tokens: Any) -> None:
        """Note the time: called with the prompt, and then with each token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing after the last token."""


def projections_of(model: Any, tokenizer: Any, file: Path, tokens: int) -> aqua.Projections:
    """Those of the file, which is made first where there is none."""
    if file.exists():
        return aqua.Projections.load(file)
    text = aqua.load_text("builtin:calibration")
    with progress_bar("calibrate") as progress:
        projections = aqua.calibrate(model, tokenizer, text, tokens=tokens, progress=progress)
    projections.save(file)
    return projections


def ask(model: Any, tokenizer: Any, tokens: Any, attachment: Any, new_tokens: int) -> Measured:
    """The answer to a prompt, dense (an attachment of None) or under AQUA."""
    # The first call makes kernels and allocators ready, which is no part of an answer's time.
    generate(model, tokenizer, [tokens[0, :32].tolist()], attachment, max_new_tokens=4)
    before, clock = memory_in_use(model.device, reset=True), Clock()
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "return_dict_in_generate": True, "streamer": clock}
    output = generate(model, tokenizer, tokens.tolist(), attachment, **options)
    peak = memory_in_use(model.device)
    start, _, first, *rest = clock.times
    answer = tokenizer.decode(output.sequences[0, tokens.shape[1] :], skip_special_tokens=True).strip()
    per_token = (rest[-1] - first) / len(rest) if rest else 0.0
    added = peak - before if peak and before else None
    return Measured(answer, first - start, per_token, storage_bytes(output.past_key_values), added)


def main() -> None:
    """Load, calibrate once, ask each way, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", default="builtin:evaluation", help="the document (default: a text in the package)")
    parser.add_argument("--question", default=QUESTION, help="what to ask (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=4096, help="how much of the document is read (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=48, help="how long an answer may be (%(default)s)")
    parser.add_argument("--preset", action="append", help="an AQUA setting; may be repeated (default: fast, small)")
    parser.add_argument("--model", default="smollm2", help="a folder, a .gguf file or a hub id (%(default)s)")
    parser.add_argument("-p", "--projections", type=Path, default=Path("smollm2.safetensors"), help="made if missing")
    parser.add_argument("--calibration-tokens", type=int, default=16384, help="read to make them (%(default)s)")
    given = parser.parse_args()
    settings = {name: aqua.AquaConfig.preset(name) for name in given.preset or ("fast", "small")}
    text = aqua.load_text(given.file)
    model, tokenizer = aqua.load_model(given.model)
    projections = projections_of(model, tokenizer, given.projections, given.calibration_tokens)
    document = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][: given.tokens])
    tokens = encode_prompt(tokenizer, f"{document}\n\n{given.question}")
    CONSOLE.print(f"{given.model} on {model.device}, a prompt of {tokens.shape[1]} tokens", markup=False)
    CONSOLE.print(f"{given.question}\n", style="bold", markup=False)
    table = []
    for name, config in {"dense": None, **settings}.items():
        attachment = config and aqua.apply(model, projections, config)
        found = ask(model, tokenizer, tokens, attachment, given.new_tokens)
        CONSOLE.print(f"{name}: {found.answer}\n", markup=False)
        peak = "unknown" if found.peak_bytes is None else f"{found.peak_bytes / 1e6:.0f}"
        times = f"{found.prompt_seconds:.2f}", f"{found.seconds_per_token * 1e3:.1f}"
        table.append([name, *times, f"{found.cache_bytes / 1e6:.1f}", peak])
    print_table((["attention", "first token, s", "a further token, ms", "cache, MB", "peak memory added, MB"], table))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (aqua.AquaError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
