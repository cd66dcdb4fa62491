# SPDX-License-Identifier: Apache-2.0
"""AQUA as a model type of lm-evaluation-harness: importing this module makes its `--model aqua` known.

It needs the extra: `pip install '.[lm-eval]'` in the clone.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedModel

from aqua_attention.attach.door import apply
from aqua_attention.calibration.projections import Projections
from aqua_attention.config import DECODING, DEFAULT_PRESET, DENSE_PROMPTS, AquaConfig, knobs
from aqua_attention.data.models import DEFAULT_MODEL, load_model, loading
from aqua_attention.errors import AquaError, did_you_mean


@register_model("aqua")
class AquaLM(HFLM):
    """A transformers model under AQUA attention, in log-likelihoods and in generation.

    `model_args` are those of `hf`, and `projections`, `basis`, `preset` (see `AquaConfig.preset`) and the fields of
    `AquaConfig`: `pretrained=smollm2,projections=smollm2.safetensors,preset=paper,k_ratio=0.5`.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel = DEFAULT_MODEL,
        projections: str | Path | Projections | None = None,
        basis: str = "aqua",
        preset: str = DEFAULT_PRESET,
        device: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Load the model as `hf` does ("smollm2": the default model, fetched once), and attach AQUA to it for good.

        A `device` of None takes cuda where there is one, else cpu; `basis`: see `Projections.with_basis`. AquaError as
        `apply`, and without projections.
        """
        given = {name: kwargs.pop(name) for name in knobs() if name in kwargs}
        config = AquaConfig.preset(preset, **given)
        if config.select_in == DECODING:
            warnings.warn(DENSE_PROMPTS, stacklevel=2)
        if projections is None:
            raise AquaError(
                "model_args has no projections: make them with `aqua calibrate`, and add projections=FILE to model_args"
            )
        learned = Projections.of(projections)
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if pretrained == DEFAULT_MODEL:
            dtype = kwargs.pop("dtype", None) or "auto"
            pretrained, kwargs["tokenizer"] = load_model(DEFAULT_MODEL, dtype=dtype, device=device)
        name = pretrained if isinstance(pretrained, str) else pretrained.config.name_or_path
        with loading(name, kwargs), _named_arguments():
            super().__init__(pretrained, device=device, **kwargs)
        self.attachment = apply(self.model, learned.with_basis(basis), config)
        self.attachment.attach()

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits [batch, length, vocabulary], without a cache: there `bits` rounds what a cache would round."""
        if self.attachment.config.h2o_ratio < 1:
            raise AquaError(
                "h2o_ratio acts on a cache, which lm-evaluation-harness has none of for log-likelihoods: leave it out, "
                "ask for tasks that generate, or use `aqua eval tasks`"
            )
        lower = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype=lower, enabled=lower is not None):
            return self.model(inps, use_cache=False).logits


@contextmanager
def _named_arguments() -> Iterator[None]:
    """While open, an argument that nobody knows is an AquaError: what `hf` does not know is handed to the model."""
    try:
        yield
    except TypeError as error:
        if not (found := re.search(r"unexpected keyword argument '(\w+)'", str(error))):
            raise
        names = [*knobs(), "projections", "basis", "preset", "pretrained", "dtype"]
        remedy = did_you_mean(found[1], names) or f"AQUA's own are {', '.join(names)}"
        raise AquaError(
            f"model_args has {found[1]}, which neither AQUA, lm-eval nor the model knows: {remedy}"
        ) from error
