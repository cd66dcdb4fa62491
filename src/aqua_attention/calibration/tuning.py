# SPDX-License-Identifier: Apache-2.0
"""Calibration, third pass: the rotations of all layers are turned together, until the model predicts as if dense.

The second pass looks at the attention of one head at a time. What a head loses matters more or less to what the model
predicts, and that only the whole model shows. So the loss here is the KL divergence of the next-token distribution from
that of dense attention, for several ways of dropping dimensions. Gradients go through every layer to every rotation; a
choice of dimensions has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div
from torch.utils.checkpoint import checkpoint as recomputed
from transformers import PreTrainedModel

from aqua_attention.calibration.checkpoint import LaterState, Shapes, carry_through
from aqua_attention.calibration.positions import placed
from aqua_attention.calibration.projections import LEARNED, TUNED, Projections, layer_projection
from aqua_attention.calibration.reading import Reading, check_learnable, numbered, sampled
from aqua_attention.calibration.rotations import orthogonal, spread_along, stepped, turnable
from aqua_attention.calibration.sample import RECENT, SINK
from aqua_attention.config import AquaConfig
from aqua_attention.errors import AquaError
from aqua_attention.model import capture, interface
from aqua_attention.model.limits import check_predicts
from aqua_attention.ops.mask import visible_and_exact
from aqua_attention.ops.plan import Call, LayerPlan
from aqua_attention.ops.select import rotate, select_dimensions, without_autocast

RATE = 0.001
MOST_NUMBERS = 1 << 29
"""Scores, or logits, of the targets in one pass: with all in one a small model waits less for launches."""
STRAIGHTENED = 16
"""Steps after which rounding is taken out of the rotations."""
QUERIES, LEAST_SAMPLED = 256, 16
"""Queries of a window, and windows, from which is seen how keys vary under attention."""
STATE = ("rotation", "momentum", "scale")


class Target(NamedTuple):
    """One way in which dimensions are dropped, and how much it counts."""

    name: str
    config: AquaConfig
    weight: float


def _target(name: str, weight: float, **knobs: Any) -> Target:
    knobs |= {"selection": "weighted", "sink": SINK, "recent": RECENT, "min_length": 0}
    return Target(name, AquaConfig(**knobs), weight)


TARGETS = (
    _target("0.25 group", 1.0, k_ratio=0.25, share="group"),
    _target("0.5 group", 3.0, k_ratio=0.5, share="group"),
    _target("0.75 group", 1.0, k_ratio=0.75, share="group"),
    _target("0.5 head", 2.0, k_ratio=0.5, share="head"),
    _target("s_ratio 0.25", 1.0, k_ratio=1.0, s_ratio=0.25),
)


def tune(
    model: PreTrainedModel,
    projections: Projections,
    windows: Tensor,
    *,
    last_position: int | None = None,
    seed: int = 0,
    checkpoint: Path | str | None = None,
    checkpoint_seconds: float = 10.0,
    progress: Callable[[int, int], None] | None = None,
) -> Projections:
    """Rotations with which the model predicts more nearly as with dense attention; or `projections`, where none are.

    A window takes a forward and a backward pass for each of `TARGETS`: this is for a GPU. Sliding-window layers keep
    their rotations, because they multiply every dimension unless asked otherwise.

    Args:
        projections: of the same model, by singular vectors or learned.
        windows, last_position, seed, checkpoint, checkpoint_seconds, progress: as of `learned.learn`; the same windows
            are held out.

    Raises:
        AquaError: as of `learned.learn`; a float16 model, whose gradients vanish, or one that predicts no tokens.
    """
    found = [layer for layer in capture.attention_layers(model) if layer.index in projections.layers]
    check_learnable(type(model).__name__, found, windows)
    check_tunable(model)
    device = capture.input_device(model).type
    plain, fast = without_autocast(device), _fast_products(device)
    with torch.inference_mode(False), torch.no_grad(), plain, fast, interface.looking_at(model), _frozen(model):
        run = _Tuning(model, projections, found, Reading.of(model, windows, last_position, seed), seed)
        state = LaterState(checkpoint, run.reading.identity(projections) | {"pass": TUNED}, seconds=checkpoint_seconds)
        carry_through(run, state, progress)
        return run.projections()


def check_tunable(model: PreTrainedModel) -> None:
    """Raise AquaError where the rotations of a model cannot be tuned."""
    check_predicts(model)
    if model.dtype == torch.float16:
        raise AquaError("the model is float16, in which gradients vanish: load it in float32 or bfloat16 to tune")


@contextmanager
def _fast_products(device: str) -> Iterator[None]:
    """While open, a GPU multiplies float32 matrices on its tensor cores: 10 bits of each number are enough here."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device == "cuda" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """While open, no weight takes a gradient, and there is no dropout."""
    wanted = [each for each in model.parameters() if each.requires_grad]
    for each in wanted:
        each.requires_grad_(False)
    try:
        with capture.evaluation_mode(model):
            yield
    finally:
        for each in wanted:
            each.requires_grad_(True)


class _Tuning:
    """One run; what it learns is in lists, a tensor [num_key_value_heads, head_dim, head_dim] a layer."""

    def __init__(
        self,
        model: PreTrainedModel,
        projections: Projections,
        layers: list[capture.AttentionLayer],
        reading: Reading,
        seed: int,
    ) -> None:
        self.model, self.base, self.seed = model, projections, seed
        self._layers, self.reading = layers, reading
        self.count = len(reading.windows)
        self.shapes: Shapes = [
            dict.fromkeys(STATE, (layer.num_key_value_heads, layer.head_dim, layer.head_dim)) for layer in layers
        ]
        length, words = len(reading.windows[0]), model.get_input_embeddings().weight.shape[0]
        most = length * max(words, *(layer.num_attention_heads * length for layer in layers))
        at_once = max(1, MOST_NUMBERS // most)
        self._blocks = [TARGETS[start : start + at_once] for start in range(0, len(TARGETS), at_once)]
        self._plans: dict[nn.Module, list[LayerPlan]] = {}
        """Of the layers that drop dimensions now, one for each row; none: all attention is dense."""
        self._dropped: set[nn.Module] = set()
        """Of the layers that ever did; the others slide, and nothing is known of them."""
        self._causal: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def begin(self, stored: tuple[int, list[dict[str, Tensor]]] | None) -> int:
        """Measure what is lost before, and take up what is stored; returns the windows done."""
        # Copies, because what was made in inference mode has no gradient.
        own = [self.base.layers[layer.index].rotation.clone().to(layer.device) for layer in self._layers]
        self.rotation = self._start = own
        self.momentum = self.scale = [torch.zeros_like(each) for each in own]
        self._covariance = self._covariances()
        self._before = self._held_loss(own)
        if stored is None:
            return 0
        done, tensors = stored
        for name in STATE:
            moved = [each[name].to(layer.device) for each, layer in zip(tensors, self._layers, strict=True)]
            setattr(self, name, moved)
        return done

    def visit(self, index: int) -> None:
        """Read a window, and take one step; none where a number overflows."""
        if not self._dropped:
            return
        window, place = self.reading.windows[index], self.reading.places[index]
        expected = self._predicted(window, place)
        gradients = [torch.zeros_like(each) for each in self.rotation]
        for block in self._blocks:
            # Where nothing is lost, nothing is to be won.
            weights = [target.weight / before if (before := self._before[target.name]) else 0.0 for target in block]
            with torch.enable_grad():
                turns, turned = zip(*map(turnable, self.rotation), strict=True)
                losses = self._divergences(window, place, expected, block, turned)
                loss = (losses * losses.new_tensor(weights)).sum()
                part = torch.autograd.grad(loss, turns, materialize_grads=True)
            gradients = [sum_ + new for sum_, new in zip(gradients, part, strict=True)]
        if not all(bool(torch.isfinite(each).all()) for each in gradients):
            return
        rate = RATE * (1 - index / self.count)
        moments = zip(self.rotation, gradients, self.momentum, self.scale, strict=True)
        moved = zip(*(stepped(*each, index + 1, rate) for each in moments), strict=True)
        self.rotation, self.momentum, self.scale = map(list, moved)
        if index % STRAIGHTENED == STRAIGHTENED - 1:
            self.rotation = [orthogonal(each) for each in self.rotation]

    def tensors(self) -> list[dict[str, Tensor]]:
        """The state of each layer."""
        return [{name: getattr(self, name)[place] for name in STATE} for place in range(len(self._layers))]

    def projections(self) -> Projections:
        """The tuned rotations, or the earlier ones if the tuned ones are no better on the held-out windows."""
        tuned = [orthogonal(each) for each in self.rotation]
        after = self._held_loss(tuned) if self._dropped else self._before
        losses = {name: [round(before, 6), round(after[name], 6)] for name, before in self._before.items()}
        changes = [
            target.weight * (after[target.name] / before - 1)
            for target in TARGETS
            if (before := self._before[target.name]) > 0
        ]
        change = sum(changes)
        facts = {"windows": self.reading.distinct, "windows_read": self.count, "seed": self.seed, "kl": losses}
        facts |= {"kept": change < 0}
        recorded = replace(self.base, calibration=self.base.calibration | {"tuned": facts})
        if not change < 0:
            return recorded
        layers = dict(self.base.layers)
        for layer, rotation, spread in zip(self._layers, tuned, self._spreads(tuned), strict=True):
            if layer.module not in self._dropped:
                continue
            size = self.base.layers[layer.index].key_rms.norm(dim=-1, keepdim=True)
            # As long as before, so that `logit_error` means the same.
            spread = spread.cpu() * (size / spread.cpu().norm(dim=-1, keepdim=True).clamp_min(1e-30))
            tensors = rotation.cpu().contiguous(), spread.contiguous()
            layers[layer.index] = layer_projection(self.base.statistics[layer.index], *tensors)
        return replace(recorded, layers=layers, basis=LEARNED)

    def _covariances(self) -> list[Tensor]:
        """How keys of each layer vary under attention, mean over some windows; see `Sample.covariance`."""
        windows = list(zip(self.reading.windows, self.reading.places, strict=True))[:LEAST_SAMPLED]
        total = [torch.zeros_like(each) for each in self._start]
        for index, (window, place) in enumerate(windows):
            number = numbered(self.seed, index)
            samples = sampled(self.model, self._layers, window, place, queries=QUERIES, seed=number)
            seen = [samples[layer.module].covariance() / len(windows) for layer in self._layers]
            total = [one + two for one, two in zip(total, seen, strict=True)]
        return total

    def _spreads(self, rotations: Sequence[Tensor]) -> list[Tensor]:
        return [spread_along(*each) for each in zip(rotations, self._covariance, strict=True)]

    def _held_loss(self, rotations: Sequence[Tensor]) -> dict[str, float]:
        """KL divergence of each target by name, mean over what is held out."""
        losses = dict.fromkeys((target.name for target in TARGETS), 0.0)
        for window, place in zip(self.reading.held, self.reading.held_places, strict=True):
            expected = self._predicted(window, place)
            for block in self._blocks:
                found = self._divergences(window, place, expected, block, rotations).tolist()
                for target, loss in zip(block, found, strict=True):
                    losses[target.name] += loss / len(self.reading.held)
        if not all(map(math.isfinite, losses.values())):
            raise AquaError(f"{type(self.model).__name__} gives NaN or infinite logits: load it in float32 to tune")
        # Rounding of a divergence of zero.
        return {name: each if each > 1e-7 else 0.0 for name, each in losses.items()}

    def _divergences(
        self,
        window: Tensor,
        place: int | None,
        expected: Tensor,
        targets: Sequence[Target],
        rotations: Sequence[Tensor],
    ) -> Tensor:
        """KL divergence from what is expected, mean over tokens, of each target."""
        spreads = self._spreads([each.detach() for each in rotations])
        for layer, rotation, spread in zip(self._layers, rotations, spreads, strict=True):
            self._plans[layer.module] = [
                LayerPlan(rotation, spread[:, : each.config.kept_dims(layer.head_dim)], each.config, 1.0)
                for each in targets
            ]
        try:
            found = self._predicted(window, place, rows=len(targets))
        finally:
            self._plans.clear()
        parts = [kl_div(row, expected[0], log_target=True, reduction="sum") for row in found]
        return torch.stack(parts) / expected.shape[1]

    def _predicted(self, window: Tensor, place: int | None, rows: int = 1) -> Tensor:
        """Logarithms of next-token probabilities, [rows, tokens, vocabulary], of tokens outside the exact window."""
        device = capture.input_device(self.model)
        inputs = {name: each.to(device).expand(rows, -1) for name, each in placed(window, place).items()}
        attention = interface.attention_function(type(self.model).__name__, self._attend)
        _, undo = interface.install(self.model, attention, interface.mask_builder(0, 0))
        try:
            logits = self.model(**inputs, use_cache=False).logits
        finally:
            undo()
        return logits[:, SINK + RECENT :].float().log_softmax(-1)

    def _attend(self, module: nn.Module, call: Call, causal: bool, given: dict[str, Any]) -> Tensor:
        plans = self._plans.get(module)
        if plans is None or given.get("sliding_window"):
            return interface.attend_dense(interface.directed(call, causal))
        if call.softcap is not None:
            raise AquaError("a basis is not tuned for scores with a soft limit (softcap): use basis svd")
        self._dropped.add(module)
        return recomputed(attention_dropping, call, plans, plans[0].rotation, *self._seen(call), use_reentrant=False)

    def _seen(self, call: Call) -> tuple[Tensor, Tensor]:
        """See `outside_and_hidden`; without a mask it is the same in every call."""
        length, device = call.query.shape[2], call.query.device
        if call.mask is None and device in self._causal:
            return self._causal[device]
        sizes = {"queries": length, "keys": length, "start": 0, "sink": SINK, "recent": RECENT}
        found = outside_and_hidden(*visible_and_exact(call.mask, **sizes, device=device))
        if call.mask is None:
            self._causal[device] = found
        return found


def outside_and_hidden(visible: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    """Masks as numbers, because filling by a mask copies all scores first.

    Args:
        visible, exact: what a query sees, and what of that is in the exact window, see `mask.visible_and_exact`.

    Returns:
        1 outside the exact window, 0 in it; and minus infinity where a query does not see a key, else 0.
    """
    hidden = torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, -torch.inf)
    return (~exact).float(), hidden


def attention_dropping(
    call: Call, plans: Sequence[LayerPlan], rotation: Tensor, outside: Tensor, hidden: Tensor
) -> Tensor:
    """`attention_reference` of a call whose keys are not rotated, with a gradient by the rotation.

    The exact scores, less what is dropped: so the rotation has a part in what is dropped only.

    Args:
        plans: of each row of the batch, all of one rotation and exact window.
        rotation: [num_key_value_heads, head_dim, head_dim].
        outside, hidden: see `outside_and_hidden`.
    """
    (batch, heads, length, dim), groups = call.query.shape, call.key.shape[1]
    query = call.query.float() * call.scaling
    rotated = rotate(call.query, rotation)
    dropped = torch.cat([_dropped(row, plan) for row, plan in zip(rotated.split(1), plans, strict=True)])

    def products(queries: Tensor, keys: Tensor) -> Tensor:
        tall = queries.reshape(batch, groups, -1, dim)
        return (tall @ keys.float().transpose(-1, -2)).view(batch, heads, length, -1)

    lost = products(dropped.float() * call.scaling, rotate(call.key, rotation))
    scores = torch.addcmul(products(query, call.key), lost, outside, value=-1) + hidden
    if call.s_aux is not None:
        extra = call.s_aux.float().reshape(1, heads, 1, 1).expand(batch, heads, length, 1)
        scores = torch.cat([scores, extra], -1)
    attention = scores.softmax(-1)[..., : call.key.shape[2]].to(call.value.dtype)
    return (attention.view(batch, groups, -1, call.key.shape[2]) @ call.value).view(batch, heads, length, -1)


def _dropped(query: Tensor, plan: LayerPlan) -> Tensor:
    """Rotated queries without what they multiply."""
    selected = select_dimensions(query.detach(), plan)
    return torch.zeros_like(query) if selected is None else query.masked_fill(selected, 0)
