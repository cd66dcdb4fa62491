# SPDX-License-Identifier: Apache-2.0
"""Perplexity, KL divergence and top-1 agreement of AQUA against dense attention, on the same windows in one run."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from aqua_attention.attach.apply import Attachment
from aqua_attention.data.text import text_digest
from aqua_attention.errors import AquaError
from aqua_attention.evaluate.run import Job, Progress, counting, damaged
from aqua_attention.evaluate.setting import Run, Setting, Subject, runs_of, warn_of_dense_prompts
from aqua_attention.evaluate.suites.grid import Sizes
from aqua_attention.model.capture import input_device
from aqua_attention.model.limits import check_predicts, check_tokens

CHUNK = 128
"""Tokens that are scored at once after a prefill."""
ROWS_AT_ONCE = 256
"""Positions whose next-token distributions are compared at once; bounds the float32 copies of the logits."""
KEPT_BYTES = 4 << 30
"""Dense logits that `DenseLogits` keeps."""
SCORED = {False: "all", True: "second half"}
"""What of a window is scored, by whether it is read as a conversation."""


@dataclass
class _Sums:
    loss: float = 0.0
    kl: float = 0.0
    agree: int = 0
    tokens: int = 0

    def add(self, logits: Tensor, dense_logits: Tensor, targets: Tensor) -> None:
        for start in range(0, len(targets), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            log_p = logits[part].float().log_softmax(-1)
            self.loss -= float(log_p.gather(-1, targets[part, None]).sum())
            self.tokens += len(log_p)
            if logits is dense_logits:
                self.agree += len(log_p)
                continue
            dense_log_p = dense_logits[part].float().log_softmax(-1)
            self.kl += float((dense_log_p.exp() * (dense_log_p - log_p)).sum())
            self.agree += int((log_p.argmax(-1) == dense_log_p.argmax(-1)).sum())

    def perplexity(self, what: str) -> float:
        mean = self.loss / self.tokens
        if not math.isfinite(mean):
            raise damaged(f"the model gives NaN or infinite logits with {what}")
        return math.exp(min(mean, 700.0))


@dataclass(eq=False, repr=False)
class DenseLogits:
    """The dense model's logits, kept for several calls over the same windows of the same model.

    Those beyond `most_bytes` are computed again in each call; asked for another model or windows, it forgets. `device`
    is where they are kept, ordinary memory by default.
    """

    most_bytes: int = KEPT_BYTES
    device: str = "cpu"
    _owner: tuple[PreTrainedModel, Tensor] | None = field(default=None, init=False)
    _kept: dict[int, Tensor] = field(default_factory=dict, init=False)

    def of(self, model: PreTrainedModel, windows: Tensor, index: int) -> Tensor:
        """Next-token logits of one window, [context - 1, vocabulary]."""
        if self._owner is None or self._owner[0] is not model or self._owner[1] is not windows:
            self._owner, self._kept = (model, windows), {}
        if index in self._kept:
            return self._kept[index].to(input_device(model))
        logits = _logits(model, windows[index][None].to(input_device(model)))
        if sum(kept.nbytes for kept in self._kept.values()) + logits.nbytes <= self.most_bytes:
            self._kept[index] = logits.to(self.device)
        return logits


def evaluate_perplexity(
    subject: Subject,
    settings: Sequence[Setting],
    windows: Tensor,
    *,
    continued: bool = False,
    dense_logits: DenseLogits | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run every window dense, then under every setting, each from its first token on.

    When a setting evicts tokens (`h2o_ratio`), every window is read as a conversation is: its first half at once, into
    a cache, and then the second in chunks of 128 tokens; only the second half is scored, of all settings and of dense.
    Otherwise a window is one forward pass without a cache, and all of it is scored.

    Args:
        windows: token ids, [count, context]; each window predicts context - 1 tokens.
        continued: read windows as conversations whatever the settings, to be comparable with settings that evict.
        dense_logits: keeps the dense model's logits for further calls.

    Returns:
        `{"dense": {"perplexity", "tokens"}, "rows": [...], "scored": "all" or "second half"}`, a row a setting:
        `Run.head`, `effective_ratio` (E = k_ratio * (1 - s_ratio)), `perplexity`, `perplexity_change` (relative to
        dense: 0.01 is one per cent), `kl` (mean KL divergence of the next-token distribution from the dense one,
        nats), `top1` (share of positions with the dense model's most likely token), `Run.mean_ks`, `tokens` (scored).

    Raises:
        AquaError: no windows, tokens that the model does not know, AQUA already attached, NaN or infinite logits.
    """
    if windows.shape[0] < 1 or windows.shape[1] < 2:
        raise AquaError(f"windows are {tuple(windows.shape)}: at least one window of two tokens is needed")
    model = subject.model
    check_predicts(model)
    check_tokens(model, windows, context=windows.shape[1])
    warn_of_dense_prompts(settings)
    runs = runs_of(subject, settings)
    continued = continued or any(setting.config.h2o_ratio < 1 for setting in settings)
    half = windows.shape[1] // 2 if continued else 0
    if half and windows.shape[1] < 4:
        raise AquaError(f"windows have {windows.shape[1]} tokens: h2o_ratio needs at least four, half of them to score")
    reference = dense_logits or DenseLogits(most_bytes=0)
    dense, sums = _Sums(), [_Sums() for _ in runs]
    step = counting(progress, len(windows) * (1 + len(runs)))
    device = input_device(model)
    with torch.no_grad():  # not inference_mode: offloaded quantised weights may fail under it
        for index, window in enumerate(windows):
            tokens = window[None].to(device)
            step(1)
            expected, targets = reference.of(model, windows, index)[half:], tokens[0, half + 1 :]
            dense.add(expected, expected, targets)
            for run, row in zip(runs, sums, strict=True):
                step(1)
                given = model, tokens, run.attachment
                row.add(_continued(*given, half) if half else _logits(*given), expected, targets)
    step(0)
    perplexity = dense.perplexity("dense attention")
    return {
        "dense": {"perplexity": perplexity, "tokens": dense.tokens},
        "rows": [_row(run, row, perplexity) for run, row in zip(runs, sums, strict=True)],
        "scored": SCORED[continued],
    }


def perplexity_jobs(subject: Subject, settings: Sequence[Setting], sizes: Sizes) -> list[Job]:
    """A job a setting. As soon as one evicts, all score second halves, to be comparable."""
    windows = subject.windows(sizes.tokens, sizes.context)
    continued = any(setting.config.h2o_ratio < 1 for setting in settings)
    shared: dict[str, Any] = {"continued": continued, "dense_logits": DenseLogits()}

    def measure(setting: Setting | None, progress: Progress, _: Path) -> dict[str, Any]:
        return perplexity_figures(subject, setting, windows, progress=progress, **shared)

    options = subject.read(windows) | {"scored": SCORED[continued]}
    return subject.jobs("perplexity", (None, *settings), options, measure, text_sha256=text_digest(subject.text))


def perplexity_figures(subject: Subject, setting: Setting | None, windows: Tensor, **options: Any) -> dict[str, Any]:
    """What `evaluate_perplexity` says of one setting, with `dense` and `scored`; without a setting, of dense itself."""
    found = evaluate_perplexity(subject, [] if setting is None else [setting], windows, **options)
    itself = found["dense"] | {"perplexity_change": 0.0, "kl": 0.0, "top1": 1.0, "mean_k": 1.0}
    row = found["rows"][0] if setting else itself
    figures = {name: value for name, value in row.items() if name not in ("setting", "basis")}
    return figures | {"dense": found["dense"], "scored": found["scored"]}


def _logits(model: PreTrainedModel, tokens: Tensor, attachment: Attachment | None = None) -> Tensor:
    """Next-token logits of one window, [context - 1, vocabulary], in the model's dtype."""
    with attachment or nullcontext():
        return model(input_ids=tokens, use_cache=False).logits[0, :-1]


def _continued(model: PreTrainedModel, tokens: Tensor, attachment: Attachment, half: int) -> Tensor:
    """The same for the tokens from `half` on, read after those before it are in the cache."""
    logits, end = [], tokens.shape[1] - 1
    with attachment:
        cache = DynamicCache(config=model.config)
        model(input_ids=tokens[:, :half], past_key_values=cache)
        for start in range(half, end, CHUNK):
            part = tokens[:, start : min(start + CHUNK, end)]
            logits.append(model(input_ids=part, past_key_values=cache).logits[0])
    return torch.cat(logits)


def _row(run: Run, sums: _Sums, dense_perplexity: float) -> dict[str, Any]:
    perplexity = sums.perplexity(str(run.setting.config))
    return run.head() | {
        "effective_ratio": run.setting.config.effective_ratio,
        "perplexity": perplexity,
        "perplexity_change": perplexity / dense_perplexity - 1,
        "kl": sums.kl / sums.tokens,
        "top1": sums.agree / sums.tokens,
        **run.mean_ks(),
        "tokens": sums.tokens,
    }
