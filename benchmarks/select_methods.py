# SPDX-License-Identifier: Apache-2.0
"""Ways to choose tokens: AQUA-Select, its ablations, and others' methods, for `select_curves.py`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from aqua_attention.ops import tokens
from aqua_attention.ops.plan import LayerPlan
from aqua_attention.ops.tokens import Choice, Scored, Way, choose_tokens, products, scores_by_dimensions

PAGE = 16
Scores = Callable[[Tensor, Tensor, Tensor | None, LayerPlan], Scored]
CHANNELS: dict[int, Tensor] = {}
"""Of each layer: root mean squares of queries times those of keys, [num_key_value_heads, head_dim]."""


@dataclass(frozen=True)
class Method:
    """One way to choose tokens.

    Attributes:
        basis: of the projections, see `Projections.with_basis`; or the name of a file.
        knobs: of the setting, besides the budget; way: how tokens are scored, chosen and weighed.
        fixed: its budget is a number of tokens, not a share of the softmax.
    """

    basis: str
    knobs: dict[str, Any]
    way: Way = field(default_factory=Way)
    fixed: bool = False


def peers(dims: float) -> dict[str, Method]:
    """Others' methods, in as many dimensions as ours where they have dimensions."""
    of_query = {"k_ratio": dims, "selection": "magnitude"}
    static = {"k_ratio": dims, "selection": "static"}
    found = {
        "SparQ": Method("none", of_query, Way(left_out="mean")),
        "Loki": Method("key-pca", static),
        "DoubleSparse": Method("none", static, Way(by_loudest_channels)),
        "Quest": Method("none", {}, Way(paged(most_possible))),
        "pages, mean and deviation": Method("none", {}, Way(paged(mean_and_deviation))),
        "oracle": Method("none", {}, Way(exactly)),
    }
    return found | {f"{name}, fixed": replace(method, fixed=True) for name, method in found.items()}


def ours(name: str, dims: float, bits: int) -> dict[str, Method]:
    """AQUA-Select with a file's rotations."""
    method = Method(name, {"k_ratio": dims, "score_bits": bits})
    return {f"AQUA ({name})": method, f"AQUA ({name}), fixed": replace(method, fixed=True)}


def ablations(name: str, dims: float, bits: int, head_dim: int) -> dict[str, Method]:
    """AQUA-Select with one choice changed at a time."""
    as_it_is = Method(name, {"k_ratio": dims, "score_bits": bits})

    def changed(way: Way | None = None, **knobs: Any) -> Method:
        return replace(as_it_is, knobs=as_it_is.knobs | knobs, way=way or Way())

    found = {"as it is": as_it_is}
    found |= {f"{few} dimensions": changed(k_ratio=few / head_dim) for few in (16, 32, 48, 64) if few < head_dim}
    found |= {f"{few} bits": changed(score_bits=few) for few in (16, 8, 4)}
    found |= {"magnitude": changed(selection="magnitude"), "static": changed(selection="static")}
    found |= {"dimensions by head": changed(share="head")}
    found |= {f"left out: {each}": changed(Way(left_out=each)) for each in ("mean", "others")}
    found |= {"pages by largest": changed(Way(by_pages(largest))), "pages by sum": changed(Way(by_pages(summed)))}
    # These have no second copy of the keys: the copy that scores is all there is, outside the exact window.
    found |= {f"values only, {part:.0%}": changed(Way(exact_keys=False), k_ratio=part) for part in (0.5, 0.75)}
    return found | {"first layer dense": changed(dense_until(1)), "first two layers dense": changed(dense_until(2))}


def exactly(query: Tensor, key: Tensor, _: Tensor | None, plan: LayerPlan) -> Scored:
    """An oracle's scores."""
    return Scored(products(query, key), 0.0)


def by_loudest_channels(query: Tensor, key: Tensor, _: Tensor | None, plan: LayerPlan) -> Scored:
    """DoubleSparse: the channels whose products are largest on the calibration text, the same for all queries."""
    chosen = torch.zeros_like(plan.key_rms, dtype=torch.bool)
    chosen.scatter_(-1, CHANNELS[plan.index].to(query.device).topk(plan.k, -1).indices, True)
    rows = chosen.repeat_interleave(query.shape[1] // key.shape[1], 0)[None, :, None].expand(query.shape)
    return scores_by_dimensions(query, key, rows, plan)


def paged(of_page: Callable[[Tensor, Tensor], Tensor]) -> Scores:
    """Scores of whole pages: the tokens of one score the same, so that all of them are read or none."""

    def scores(query: Tensor, key: Tensor, _: Tensor | None, plan: LayerPlan) -> Scored:
        count = key.shape[2]
        rest = -count % PAGE
        # The last page is filled up with its last token.
        whole = torch.cat([key, key[:, :, -1:].expand(-1, -1, rest, -1)], 2).unflatten(2, (-1, PAGE))
        found = of_page(query, whole).repeat_interleave(PAGE, -1)[..., :count]
        return Scored(found, 2 * key.shape[-1] * 2 / PAGE)

    return scores


def most_possible(query: Tensor, pages: Tensor) -> Tensor:
    """Quest: the largest product that a key within a page's minimum and maximum could have."""
    return products(query.clamp_min(0), pages.amax(3)) + products(query.clamp_max(0), pages.amin(3))


def mean_and_deviation(query: Tensor, pages: Tensor) -> Tensor:
    """The product with a page's mean, and one standard deviation of it."""
    return products(query, pages.mean(3)) + products(query.square(), pages.var(3, correction=0)).sqrt()


def by_pages(of_page: Callable[[Tensor, float], Tensor]) -> Scores:
    """AQUA's scores of tokens, of which all of a page have one, so that all of them are read or none.

    A page that a query sees in part lies in its exact window, whose scores are others, as long as `recent` is a page.
    """

    def scores(query: Tensor, key: Tensor, selected: Tensor | None, plan: LayerPlan) -> Scored:
        found, read = scores_by_dimensions(query, key, selected, plan)
        count = found.shape[-1]
        whole = torch.nn.functional.pad(found, (0, -count % PAGE), value=-torch.inf).unflatten(-1, (-1, PAGE))
        return Scored(of_page(whole, plan.scaling).repeat_interleave(PAGE, -1)[..., :count], read)

    return scores


def largest(pages: Tensor, _: float) -> Tensor:
    """The largest score of a page."""
    return pages.amax(-1)


def summed(pages: Tensor, scaling: float) -> Tensor:
    """The score that gives a page's tokens, all together, the weight that they have."""
    return (pages * scaling).logsumexp(-1).sub(torch.tensor(PAGE).log().item()) / scaling


def dense_until(layers: int) -> Way:
    """The first layers read everything, and score nothing for it."""

    def scores(query: Tensor, key: Tensor, selected: Tensor | None, plan: LayerPlan) -> Scored:
        found = scores_by_dimensions(query, key, selected, plan)
        return found._replace(read=0.0) if plan.index < layers else found

    def choose(weight: Tensor, visible: Tensor, exact: Tensor, plan: LayerPlan) -> Tensor:
        return visible if plan.index < layers else choose_tokens(weight, visible, exact, plan)

    return Way(scores, choose)


def p_by_layer(found: Mapping[float, Sequence[float]]) -> Way:
    """Each layer asks for another p, such that it obtains what was asked.

    Args:
        found: by p asked: the exact mass that each layer obtained.
    """
    asked = torch.tensor(sorted(found), dtype=torch.float64)
    obtained = torch.tensor([found[p] for p in sorted(found)], dtype=torch.float64).T

    def choose(weight: Tensor, visible: Tensor, exact: Tensor, plan: LayerPlan) -> Tensor:
        wanted = plan.config.select_p
        assert wanted is not None
        p = interpolated(wanted, obtained[plan.index].tolist(), asked.tolist())
        return choose_tokens(weight, visible, exact, replace(plan, config=replace(plan.config, select_p=p)))

    return Way(choose=choose)


def interpolated(wanted: float, obtained: Sequence[float], asked: Sequence[float]) -> float:
    """What to ask for to obtain `wanted`, on a straight line between logits; beyond both ends with the same error."""

    def logit(p: float) -> float:
        return float(torch.tensor(min(max(p, 1e-6), 1 - 1e-6), dtype=torch.float64).logit())

    target, xs, ys = logit(wanted), [logit(p) for p in obtained], [logit(p) for p in asked]
    if target <= xs[0] or target >= xs[-1]:
        end = 0 if target <= xs[0] else -1
        result = target + ys[end] - xs[end]
    else:
        place = next(each for each in range(1, len(xs)) if xs[each] >= target)
        part = (target - xs[place - 1]) / (xs[place] - xs[place - 1])
        result = ys[place - 1] + part * (ys[place] - ys[place - 1])
    return float(torch.tensor(result, dtype=torch.float64).sigmoid())


class Masses:
    """The exact softmax mass that chosen tokens hold, mean over queries and key-value heads, by layer.

    Beside it what the scores make of it, and the exact mass of queries that p decides for: their exact window holds
    less than p, and they do not read all.
    """

    def __init__(self) -> None:
        """Nothing yet."""
        self._sums: dict[int, Tensor] = {}

    def watch(self, choice: Choice) -> None:
        """Add a block of queries."""
        held = self._held(choice.weight, choice)
        likely = self._held(choice.approximate, choice)
        read, whole = choice.read.sum(-1), choice.visible.sum(-1)
        decided = (read > choice.exact.sum(-1)) & (read < whole)
        counts = torch.full_like(held, 1).sum(), decided.sum()
        found = torch.stack([held.sum(), likely.sum(), (held * decided).sum(), *counts])
        self._sums[choice.layer] = self._sums.get(choice.layer, torch.zeros_like(found)) + found

    @staticmethod
    def _held(weight: Tensor, choice: Choice) -> Tensor:
        part, whole = ((weight * each).sum(-1).double() for each in (choice.read, choice.visible))
        return part / whole

    def figures(self) -> dict[str, Any]:
        """`mass`, `mass_expected` and `mass_decided`, and each by layer; None where there was no such query. Nothing at
        all where nobody watched.
        """
        if not self._sums:
            return {}
        rows = torch.stack([self._sums[layer] for layer in sorted(self._sums)]).cpu()
        found: dict[str, Any] = {}
        for place, (name, counted) in enumerate((("mass", 3), ("mass_expected", 3), ("mass_decided", 4))):
            layers = [float(row[place] / row[counted]) if row[counted] else None for row in rows]
            total = rows.sum(0)
            found[name] = float(total[place] / total[counted]) if total[counted] else None
            found[f"{name}_per_layer"] = layers
        return found


@contextmanager
def measuring(way: Way, watched: bool = True) -> Iterator[Masses]:
    """While open, tokens are chosen so; gives what they hold, where that is watched."""
    before, masses = tokens.WAY, Masses()
    tokens.WAY = replace(way, watch=masses.watch) if watched else way
    try:
        yield masses
    finally:
        tokens.WAY = before
