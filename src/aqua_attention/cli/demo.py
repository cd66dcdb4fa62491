# SPDX-License-Identifier: Apache-2.0
"""The whole story on one small real model: calibrate, measure what is lost, write the same answer twice."""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from aqua_attention.attach.door import apply
from aqua_attention.calibration.run import calibrate
from aqua_attention.cli.outputs import DEMO_TITLE, check_writable
from aqua_attention.cli.terminal import command_line
from aqua_attention.config import AquaConfig
from aqua_attention.data.models import DEFAULT_MODEL, load_model
from aqua_attention.data.text import load_text
from aqua_attention.evaluate.generation import continue_prompt
from aqua_attention.evaluate.record import make_folder, now, provenance, write_result
from aqua_attention.evaluate.setting import Setting, Subject
from aqua_attention.evaluate.suites.perplexity import evaluate_perplexity
from aqua_attention.io.files import write_atomically
from aqua_attention.report.tables import describe_setting, markdown, perplexity_table

RATIOS = (0.75, 0.5, 0.25)
CONTEXT, CALIBRATION_TOKENS, EVALUATION_TOKENS = 2048, 8 * 2048, 3 * 2048
PROMPT = "Explain in a few sentences what a Python dictionary is and when to use one."
NEW_TOKENS = 64


def by_head(k_ratio: float) -> AquaConfig:
    """The default, but each query head has its own dimensions, as in the paper."""
    return AquaConfig(k_ratio=k_ratio, share="head")


def run_demo(out: Path, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Run the demo and write `smollm2.safetensors`, `table.md` and `summary.json` into the folder `out`.

    It calls progress(name of the step, done, total), and returns what `summary.json` holds: the rows of
    `evaluate_perplexity`, the two texts, times and peak memory.
    """
    make_folder(out)
    files = out / "smollm2.safetensors", out / "table.md", out / "summary.json"
    for kind, file in zip(("projections", "page", "figures"), files, strict=True):
        check_writable(kind, file)
    begun, seconds, started = now(), {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal started
        seconds[name], started = round(time.perf_counter() - started, 1), time.perf_counter()

    progress("load", 0, 1)
    model, tokenizer = load_model(DEFAULT_MODEL)
    progress("load", 1, 1)
    lap("load")
    sizes: dict[str, Any] = {"tokens": CALIBRATION_TOKENS, "context": CONTEXT, "name": DEFAULT_MODEL}
    text, watch = load_text("builtin:calibration"), partial(progress, "calibrate")
    projections = calibrate(model, tokenizer, text, **sizes, progress=watch)
    projections.save(files[0])
    lap("calibrate")
    configs = [*map(AquaConfig.paper, RATIOS), AquaConfig(), *map(by_head, RATIOS)]
    settings, watch = [Setting(config) for config in configs], partial(progress, "evaluate")
    data = "builtin:evaluation"
    rests_on = provenance(files[0], projections)
    subject = Subject(DEFAULT_MODEL, model, tokenizer, projections, data, load_text(data), rests_on=rests_on)
    windows = subject.windows(EVALUATION_TOKENS, CONTEXT)
    summary = evaluate_perplexity(subject, settings, windows, progress=watch)
    lap("evaluate")
    progress("generate", 0, 2)
    dense = continue_prompt(model, tokenizer, PROMPT, max_new_tokens=NEW_TOKENS)
    progress("generate", 1, 2)
    attachment = apply(model, projections, by_head(0.5))
    aqua = continue_prompt(model, tokenizer, PROMPT, max_new_tokens=NEW_TOKENS, attachment=attachment)
    progress("generate", 2, 2)
    lap("generate")
    same = dense.token_ids == aqua.token_ids
    summary["generation"] = {"prompt": PROMPT, "dense": dense.text, "aqua": aqua.text}
    summary["generation"] |= {"setting": by_head(0.5).to_dict(), "same_tokens": same}
    summary |= {"seconds": seconds, "peak_memory_bytes": _peak_memory()}
    summary |= subject.source() | {"context": windows.shape[1], "windows": len(windows)}
    write_atomically(files[1], demo_markdown(summary).encode())
    write_result(files[2], "perplexity", summary, command_line(), begun)
    return summary


def demo_markdown(summary: dict[str, Any]) -> str:
    """The table, and both texts, as a short Markdown page."""
    generation = summary["generation"]
    return (
        f"# {DEMO_TITLE}\n\n"
        f"{markdown(*perplexity_table(summary))}\n"
        f"{summary['dense']['tokens']} predictions on text that calibration did not see. "
        '"Products": query-key multiplications, measured; the few exact tokens (first + last) cost all of theirs.\n\n'
        f"**Prompt.** {generation['prompt']}\n\n"
        f"**Dense.** {generation['dense']}\n\n"
        f"**AQUA ({describe_setting(generation['setting'])}).** {generation['aqua']}\n"
    )


def _peak_memory() -> int | None:
    """Largest resident size of this process so far, in bytes; None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
