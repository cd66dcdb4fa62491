#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What each choice in learning a basis is worth: KL to dense attention with one choice changed at a time.

    python benchmarks/basis_ablation.py MODEL --data CALIBRATION --test wiki.txt --length 2048 --length 8192
    python benchmarks/basis_ablation.py MODEL --data CALIBRATION --test wiki.txt --length 2048 --tune   # third pass

Settings: weighted, exact 4 + 64. A row a variant and length. Seconds are those of the second pass, or of the third.
"""

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch

import aqua_attention as aqua
from aqua_attention.calibration import learned, learning, sample, tuning
from aqua_attention.calibration.learning import Target
from aqua_attention.calibration.positions import begins, placed
from aqua_attention.calibration.projections import Projections, layer_projection
from aqua_attention.calibration.run import CalibrationRun
from aqua_attention.data.text import load_text, token_windows, tokenize
from aqua_attention.evaluate.setting import Setting, Subject, first_windows
from aqua_attention.evaluate.suites.perplexity import DenseLogits, evaluate_perplexity
from aqua_attention.model.sides import TEXT
from aqua_attention.ops.plan import LayerPlan
from aqua_attention.ops.select import select_dimensions

SETTINGS = ({"k_ratio": 0.5}, {"k_ratio": 0.25}, {"k_ratio": 0.75}, {"k_ratio": 0.5, "share": "head"})
ONE = (Target(0.5, "group", 1.0),)
GROUPS = tuple(Target(ratio, "group", 1.0) for ratio in (0.25, 0.5, 0.75))
Changes = Sequence[tuple[ModuleType, str, Any]]
AS_IT_IS, FROM_SVD = "as it is", "from singular vectors"
VARIANTS: Mapping[str, Changes] = {
    AS_IT_IS: [],
    "divergence only": [(learning, "MEASURES", (1.0, 0.0))],
    "output only": [(learning, "MEASURES", (0.0, 1.0))],
    "0.5 group only": [(learning, "TARGETS", ONE)],
    "three k, groups, equal weights": [(learning, "TARGETS", GROUPS)],
    "without s_ratio": [(learning, "TARGETS", learning.TARGETS[:-1])],
    "rate 0.002": [(learning, "RATE", 0.002)],
    "rate 0.02": [(learning, "RATE", 0.02)],
    "128 queries a step": [(learning, "BATCH", 128)],
    "samples of one window": [(learning, "KEPT", 1), (learned, "KEPT", 1)],
    "32 queries a window": [(learned, "QUERIES", 32)],
    "24 + 24 keys a query": [(sample, "KEYS", 24)],
}


def softly(width: float) -> Changes:
    """The choice of dimensions has a gradient: that of a sigmoid of the logarithm of their sizes, so wide."""

    def dropped(query: torch.Tensor, plan: LayerPlan) -> torch.Tensor:
        selected = select_dimensions(query.detach(), plan)
        if selected is None or not plan.selects:
            return torch.zeros_like(query) if selected is None else query.masked_fill(selected, 0)
        heads = query.float().unflatten(1, (plan.key_rms.shape[0], -1)) * plan.key_rms.float()[:, None, None]
        size = heads.square()
        size = size.sum(2, keepdim=True).expand_as(size) if plan.config.share == "group" else size
        size = size.clamp_min(1e-20).log().flatten(1, 2) / 2
        limit = size.detach().topk(plan.k + 1, -1).values[..., -2:].mean(-1, keepdim=True)
        soft = ((size - limit) / width).sigmoid()
        return query * (1 - (selected + soft - soft.detach())).to(query.dtype)

    return [(tuning, "_dropped", dropped)]


def weighing(*weights: float) -> Changes:
    """The targets of the third pass with other weights."""
    return [(tuning, "TARGETS", [each._replace(weight=w) for each, w in zip(tuning.TARGETS, weights, strict=True)])]


TUNED: Mapping[str, Changes] = {
    AS_IT_IS: [],
    FROM_SVD: [],
    "equal weights": weighing(1, 1, 1, 1, 1),
    "more weight on 0.5": weighing(0.5, 4, 0.5, 4, 0.5),
    "more weight on 0.75 and head": weighing(1, 2, 2, 4, 1),
    "0.5 group only": weighing(0, 1, 0, 0, 0),
    "0.5 head only": weighing(0, 0, 0, 1, 0),
    "without s_ratio": weighing(1, 3, 1, 2, 0),
    "rate 0.0005": [(tuning, "RATE", 0.0005)],
    "rate 0.002": [(tuning, "RATE", 0.002)],
    "choice with a gradient, 0.1": softly(0.1),
    "choice with a gradient, 0.5": softly(0.5),
}
"""Of the third pass."""


@contextmanager
def changed(changes: Changes) -> Iterator[None]:
    """While open, constants of modules have other values."""
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]
    for module, name, value in changes:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def by_mean_square(projections: Projections) -> Projections:
    """The same rotations, chosen by the mean square of keys, not by how they vary under attention."""
    layers = {
        index: layer_projection(projections.statistics[index], layer.rotation)
        for index, layer in projections.layers.items()
    }
    return replace(projections, layers=layers)


def main() -> None:
    """Learn each variant, and measure it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="calibration text")
    parser.add_argument("--test", required=True, help="a text to test on")
    parser.add_argument("--length", type=int, action="append", required=True, help="tokens of a tested window")
    parser.add_argument("--context", type=int, default=2048, help="tokens of a calibration window")
    parser.add_argument("--tokens", type=int, default=20480, help="tokens tested a length")
    parser.add_argument("--learn-tokens", type=int, default=98304, help="calibration tokens")
    parser.add_argument("--last-position", type=int, help="windows are read at positions up to this")
    parser.add_argument("--tune", action="store_true", help="variants of the third pass, not of the second")
    parser.add_argument("--variant", action="append", help="only this one; may be repeated")
    given = parser.parse_args()
    variants = TUNED if given.tune else VARIANTS
    if unknown := set(given.variant or ()) - set(variants):
        parser.error(f"--variant is {', '.join(unknown)}: choose from {', '.join(variants)}")
    model, tokenizer = aqua.load_model(given.model, dtype="float32")
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    ids, prefix = tokenize(tokenizer, load_text(given.data))
    windows = token_windows(ids, tokens=given.learn_tokens, context=given.context, seed=0, prefix=prefix)
    last = given.last_position or given.context
    places = begins(model, len(windows), context=given.context, last=last)
    run = CalibrationRun(model, progress=False)
    start = run.learn([placed(*each) for each in zip(windows, places, strict=True)], {TEXT}, {})
    subject = Subject("", model, tokenizer, start, text=load_text(given.test))
    tokens = tokenize(tokenizer, subject.text)
    tested = {each: first_windows(model, tokens, max(given.tokens, each), each) for each in given.length}
    dense = {each: DenseLogits() for each in given.length}
    settings = [Setting(aqua.AquaConfig(**each)) for each in SETTINGS]
    print("variant, length: KL at 0.5 group, 0.25 group, 0.75 group, 0.5 head (to the singular vectors)")
    bases: dict[int, list[float]] = {}

    def show(name: str, projections: Projections, seconds: float) -> None:
        for length in given.length:
            found = evaluate_perplexity(
                replace(subject, projections=projections), settings, tested[length], dense_logits=dense[length]
            )
            kl = [row["kl"] for row in found["rows"]]
            base = bases.setdefault(length, kl)
            cells = ", ".join(f"{each:.4f} ({each / first:.2f})" for each, first in zip(kl, base, strict=True))
            print(f"{name}, {length}: {cells}; {seconds:.0f} s", flush=True)

    show("singular vectors", start, 0)
    if given.tune:
        began = time.perf_counter()
        second = learned.learn(model, start, windows, last_position=last)
        show("learned", second, time.perf_counter() - began)
    for name in given.variant or variants:
        began = time.perf_counter()
        with changed(variants[name]):
            if given.tune:
                found = tuning.tune(model, start if name == FROM_SVD else second, windows, last_position=last)
            else:
                found = learned.learn(model, start, windows, last_position=last)
        show(name, found, time.perf_counter() - began)
        if name == AS_IT_IS and not given.tune:
            show("chosen by mean square", by_mean_square(found), 0)


if __name__ == "__main__":
    main()
