#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Real questions answered by the kernels that choose tokens, and by plain torch: are the answers the same?

    python benchmarks/select_reference.py MODEL -p FILE --data book.txt --length 4096 --lines 200 --json reference.json

Needles and lines are asked three times: dense, by kernels, and with kernels left out. Low precision rounds differently
in the two, so that now and then another token is read. Plain torch takes long, and much memory for long prompts.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import aqua_attention as aqua
from aqua_attention.data.text import load_text, text_digest
from aqua_attention.evaluate.record import now, provenance, write_result
from aqua_attention.evaluate.run import facts_of_model
from aqua_attention.evaluate.setting import Setting, Subject
from aqua_attention.evaluate.suites.grid import Sizes
from aqua_attention.evaluate.suites.lines import lines_questions
from aqua_attention.evaluate.suites.needle import needle_questions
from aqua_attention.evaluate.suites.retrieval import Question, evaluate_retrieval
from aqua_attention.report.tables import markdown

KERNELS = "aqua_attention.ops.backends.triton.no_kernels_reason"
"""What says why no kernel runs, and so who computes."""


def main() -> None:
    """Ask, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--projections", "-p", type=Path, required=True)
    parser.add_argument("--data", required=True, help="a text, the haystack")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a needle's prompt")
    parser.add_argument("--lines", type=int, default=200, help="in a question")
    parser.add_argument("--count", type=int, default=20, help="questions of each kind")
    parser.add_argument("--p", type=float, default=0.95, help="select_p")
    parser.add_argument("--score-bits", type=int, choices=[8, 4], default=8, help="of the copy that is scored")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("the kernels need a CUDA GPU: there is none")
    started = now()
    model, tokenizer = aqua.load_model(given.model, dtype=given.dtype)
    model = model.to("cuda").eval()
    projections, text = aqua.Projections.load(given.projections), load_text(given.data)
    subject = Subject(given.model, model, tokenizer, projections, text=text)
    sizes = Sizes(lengths=(given.length,), repeats=-(-given.count // 5))
    asked = {
        f"needles, {given.length} tokens": needle_questions(subject, sizes)[: given.count],
        f"{given.lines} lines": lines_questions(given.lines, count=given.count),
    }
    setting = Setting(aqua.AquaConfig(k_ratio=0.25, score_bits=given.score_bits, select_p=given.p))
    rows = [{"task": task, **compared(subject, setting, questions)} for task, questions in asked.items()]
    cells = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    print(markdown([name.replace("_", " ") for name in rows[0]], cells))
    if given.json:
        head = {"model": given.model, "data": given.data, "text_sha256": text_digest(text), "p": given.p}
        head |= {"score_bits": given.score_bits}
        facts = head | provenance(given.projections, projections) | facts_of_model(model)
        write_result(given.json, "select_reference", facts | {"rows": rows}, shlex.join(sys.argv), started)


def compared(subject: Subject, setting: Setting, questions: list[Question]) -> dict[str, Any]:
    """How many are right, by whom, and to how many both ways give the same answer, token for token or number."""
    by_kernels = evaluate_retrieval(subject, [setting], questions)
    with patch(KERNELS, lambda device: "kernels are left out, to be compared with"):
        by_torch = evaluate_retrieval(subject, [setting], questions)
    pairs = list(zip(by_kernels["questions"], by_torch["questions"], strict=True))
    found, expected = by_kernels["rows"][0], by_torch["rows"][0]
    return {
        "questions": len(questions),
        "dense_right": sum(one["correct"][0] for one, _ in pairs),
        "kernels_right": sum(one["correct"][1] for one, _ in pairs),
        "torch_right": sum(other["correct"][1] for _, other in pairs),
        "same_answer": sum(one["answers"][1] == other["answers"][1] for one, other in pairs),
        "tokens_read_by_kernels": found["tokens_read"],
        "tokens_read_by_torch": expected["tokens_read"],
    }


if __name__ == "__main__":
    main()
