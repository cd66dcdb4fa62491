# SPDX-License-Identifier: Apache-2.0
"""A decoding step that chooses tokens (AQUA-Select), whole and in pieces, against dense attention.

Each time is of one layer in a CUDA graph over so many layers that none finds its keys in the GPU's cache. A step
rotates, chooses dimensions, appends, scores, chooses tokens and attends; dense attention only attends. Before a setting
is timed its answers are compared with those of plain torch over the same cache.

Tokens are chosen by a fixed count, of random keys, or by their mass: then keys are made so that the tokens that hold
it are given shares of all, another one for each key-value head.

With --shares, heads read what those of a real model did: a layer after the other, by mass and by a fixed count of the
same mean. The file is made by `benchmarks/select_shares.py`, of which the nearest length counts.

python benchmarks/select_decode.py --json select_decode.json
python benchmarks/select_decode.py --shares shares.json --size 32x32768 --json select_replay.json
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from select_replay import heavy_shares, recorded, said, same_count, summary

from aqua_attention.bench.dense import BASELINES
from aqua_attention.bench.timing import read_bandwidth, seconds_of
from aqua_attention.config import AquaConfig
from aqua_attention.errors import AquaError
from aqua_attention.io.files import write_json
from aqua_attention.ops import scored_step
from aqua_attention.ops.backends.triton import blocks, token_choice, token_gather, token_scores, token_work
from aqua_attention.ops.backends.triton.token_choice import choose_tokens
from aqua_attention.ops.backends.triton.token_gather import attend_to_tokens
from aqua_attention.ops.backends.triton.token_prepare import prepare_tokens
from aqua_attention.ops.backends.triton.token_scores import score_tokens
from aqua_attention.ops.backends.triton.token_step import selected_step
from aqua_attention.ops.backends.triton.token_work import TokenWork
from aqua_attention.ops.plan import LayerPlan
from aqua_attention.ops.scored import ScoredCache, score_quantization
from aqua_attention.ops.tokens import scored_bytes
from aqua_attention.report.tables import markdown

HEADS, KV_HEADS, DIM, SCORED = 32, 8, 128, 32
DTYPE, SCALING = torch.bfloat16, 128**-0.5
ROOM = 64
"""Tokens that the caches have room for: so many steps are timed before they begin anew."""
LEAST_BYTES, MOST_LAYERS = 1 << 30, 16
MASS = 0.95
SINK, RECENT = 4, 64
HEAD_SHARES = [0.02, 0.05, 0.08, 0.1, 0.15, 0.2, 0.3, 0.6]
TOLERANCE = 0.05
"""Of the difference, relative."""
TUNED = (blocks, token_choice, token_gather, token_scores, token_work)


def main():
    """Compare, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", help="sequences x tokens, as 32x32768; repeat for several")
    parser.add_argument("--share", action="append", type=float, help="of tokens that are read; repeat for several")
    parser.add_argument("--head-shares", default=",".join(map(str, HEAD_SHARES)), help="by mass, of each head; or none")
    parser.add_argument("--mass", type=float, default=MASS, help="select_p")
    parser.add_argument("--shares", type=Path, help="replay what layers of a model read; no other settings")
    parser.add_argument("--layer", type=int, action="append", help="only this one of --shares; repeat")
    parser.add_argument("--set", action="append", default=[], help="a tuned constant, as token_gather.WARPS=8; repeat")
    parser.add_argument("--bits", type=int, choices=[8], help="of keys and values; default: 16")
    parser.add_argument("--score-bits", type=int, choices=[8, 4], default=8, help="of the copy that is scored")
    parser.add_argument("--by-compiler", action="store_true", help="score and attend without placing registers by hand")
    parser.add_argument("--no-dense", action="store_true", help="leave out what it is compared with")
    parser.add_argument("--json", help="write all figures here")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this measures a CUDA GPU: there is none")
    modules = {module.__name__.split(".")[-1]: module for module in TUNED}
    for name, value in (each.split("=") for each in given.set):
        module, constant = name.split(".")
        assert hasattr(modules[module], constant), name
        setattr(modules[module], constant, int(value))
    sizes = given.size or ["32x32768", "8x131072", "1x32768", "1x131072"]
    shares = given.share or [0.06, 0.1, 0.12, 0.24]
    head_shares = [float(each) for each in given.head_shares.split(",")] if given.head_shares != "none" else None
    peak, results, replays = read_bandwidth(), [], []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, reads {peak / 1e12:.2f} TB/s at most\n")
    for size in sizes:
        batch, length = map(int, size.split("x"))
        settings = [(f"{share:.0%} of the tokens", {"select_tokens": round(share * length)}, None) for share in shares]
        if head_shares is not None:
            settings.append((f"mass {given.mass:g}", {"select_p": given.mass}, head_shares))
            same = round(sum(head_shares) / len(head_shares) * length)
            settings.append(("as many, all alike", {"select_tokens": same}, None))
        dense = {"name": "none", "seconds": None} if given.no_dense else fastest_dense(batch, length)
        print(f"{batch} x {length}: dense by {dense['name']}, {1e6 * (dense['seconds'] or 0):.1f} us\n")
        found, replay = [], None
        if given.shares:
            found, replay = replayed(batch, length, given)
        for name, knobs, wanted in () if given.shares else settings:
            torch.cuda.empty_cache()
            found.append({"name": name, **measure(batch, length, knobs, wanted, given)})
        rows = [[*row(each, dense["seconds"], peak)] for each in found]
        columns = ["", "us", "to dense", "read", *found[0]["pieces"], "error"]
        print(markdown(columns, rows) + "\n", flush=True)
        results += [{"batch": batch, "length": length, "dense": dense, **each} for each in found]
        if replay:
            print(said(replay) + "\n", flush=True)
            replays.append({"batch": batch, "length": length, **replay})
        if given.json:
            made = {"peak": peak, "device": torch.cuda.get_device_name(), "results": results}
            write_json(given.json, made | ({"replays": replays} if replays else {}))


def replayed(batch, length, given):
    """Settings by mass and by count for each layer of --shares, and what `summary` says of their times."""
    found, pairs = [], {}
    at, mass, layers = recorded(given.shares, length)
    print(f"shares of {given.shares}, recorded at {at} tokens\n")
    for layer, shares in layers.items():
        if given.layer and layer not in given.layer:
            continue
        torch.cuda.empty_cache()
        heavy = heavy_shares(shares, length, SINK + RECENT, mass)
        by_mass = measure(batch, length, {"select_p": mass}, heavy, given)
        torch.cuda.empty_cache()
        count = same_count(by_mass["read"], length, SINK + RECENT)
        by_count = measure(batch, length, {"select_tokens": count}, None, given)
        asked = sum(shares) / len(shares)
        found.append({"name": f"layer {layer}, mass {mass:g}", "layer": layer, "recorded": asked, **by_mass})
        found.append({"name": "as many, all alike", "layer": layer, **by_count})
        pairs[layer] = by_mass["seconds"], by_count["seconds"]
    if not pairs:
        raise SystemExit(f"--layer is none of {', '.join(map(str, layers))}")
    return found, summary(pairs)


def row(found, dense, peak):
    """Cells of a setting: a piece with its time and its share of the read bandwidth."""
    yield found["name"]
    yield f"{1e6 * found['seconds']:.1f}"
    yield "" if dense is None else f"{dense / found['seconds']:.2f}"
    yield f"{found['read']:.1%}"
    for piece in found["pieces"].values():
        yield f"{1e6 * piece['seconds']:.1f} ({piece['bytes'] / max(piece['seconds'], 1e-9) / peak:.0%})"
    yield f"{found['error']:.2%}"


def measure(batch, length, knobs, head_shares, given):
    """Seconds of one layer, of its pieces, what these read and write, and how far answers are from plain torch's."""
    torch.manual_seed(0)
    config = AquaConfig(
        **{"k_ratio": SCORED / DIM, "share": "group", "selection": "weighted", "sink": SINK, "recent": RECENT}
        | {"score_bits": given.score_bits, "min_length": 0}
        | knobs
    )
    rotation = torch.eye(DIM, device="cuda").expand(KV_HEADS, DIM, DIM).contiguous()
    if head_shares is None:
        rotation = torch.linalg.qr(torch.randn(KV_HEADS, DIM, DIM, device="cuda")).Q.contiguous()
    ones = torch.ones(KV_HEADS, DIM, device="cuda")
    plan = LayerPlan(rotation, ones, config, SCALING, key_scale=ones, key_mean=torch.zeros_like(ones))
    layers = max(1, min(MOST_LAYERS, LEAST_BYTES // (4 * batch * length * KV_HEADS * DIM) + 1))
    caches = [filled(batch, length, plan, head_shares, given.bits) for _ in range(layers)]
    query, key, value = (torch.randn(batch, n, DIM, dtype=DTYPE, device="cuda") for n in (HEADS, KV_HEADS, KV_HEADS))
    if head_shares is not None:
        query, key = 0.05 * query, 0.05 * key
        query[..., 0] = DIM**0.5
    output = torch.empty(batch, HEADS, DIM, dtype=DTYPE, device="cuda")
    work = TokenWork.of(caches[0], HEADS, plan.k, by_hand=False if given.by_compiler else None)

    def reset():
        for cache in caches:
            cache.lengths.fill_(length - ROOM)

    reset()
    selected_step(query, key, value, caches[0], plan, work, output, scaling=SCALING)
    error, read = compared(caches[0], plan, work, output)
    prepare = partial(prepare_tokens, query, key, value, plan=plan, work=work)
    score = partial(score_tokens, work=work, scaling=SCALING, window=(plan.sink, plan.recent), appended=True)
    choose = partial(choose_tokens, work=work, plan=plan, appended=True)
    attend = partial(attend_to_tokens, work=work, output=output, scaling=SCALING, appended=False)
    whole = partial(selected_step, query, key, value, plan=plan, work=work, output=output, scaling=SCALING)

    def timed(*steps):
        def run():
            for cache in caches:
                for step in steps:
                    step(cache=cache)

        return seconds_of(run, reset) / layers

    places, group = batch * KV_HEADS, HEADS // KV_HEADS
    tokens, taken = places * length, places * length * read
    held = 4 * DIM if given.bits is None else 2 * DIM + 4
    of_copy = scored_bytes(SCORED, given.score_bits)
    prepared = timed(prepare)
    pieces = {"prepare": (prepared, 4 * KV_HEADS * DIM * DIM)}
    scored = timed(score)
    pieces["score"] = (scored, tokens * (of_copy + 2 * group))
    # It needs the step that `prepare` counts.
    chosen = timed(prepare, score, choose) - prepared - scored
    pieces["choose"] = (chosen, tokens * 2 * group + 4 * taken)
    pieces["attend"] = (timed(attend), taken * (4 + held))
    return {
        "seconds": timed(whole),
        "read": read,
        "error": error,
        "layers": layers,
        "bits": given.bits,
        "score_bits": given.score_bits,
        "splits": work.splits,
        "chunks": work.chunks,
        "by_hand": work.by_hand,
        "gather_by_hand": work.gather_by_hand,
        "pieces": {name: dict(zip(("seconds", "bytes"), each, strict=True)) for name, each in pieces.items()},
    }


def filled(batch, length, plan, head_shares, bits):
    """Random keys and values; or keys of which given shares, anywhere, hold the mass that is asked for."""
    options = {"dtype": DTYPE, "device": "cuda", "bits": bits, "score_bits": plan.config.score_bits}
    cache = ScoredCache.empty(batch, DIM, length, score_quantization(plan), **options)
    lengths = torch.full((1,), length - ROOM, dtype=torch.int32, device="cuda")
    for index in range(batch):
        keys, values = (torch.randn(1, KV_HEADS, length, DIM, dtype=DTYPE, device="cuda") for _ in range(2))
        if head_shares is not None:
            share = torch.tensor(head_shares, device="cuda").repeat(KV_HEADS)[:KV_HEADS, None]
            mass = plan.config.select_p
            above = torch.log(mass / (1 - mass) * (1 - share) / share)
            heavy = torch.rand(KV_HEADS, length, device="cuda") < share
            keys *= 0.05
            keys[0, :, :, 0] = 0.3 * torch.randn(KV_HEADS, length, device="cuda") + above * heavy
        part(cache, slice(index, index + 1)).fill(keys, values, lengths)
    return cache


def part(cache, rows):
    """Some sequences of a cache, as a cache."""
    names = ("keys", "values", "codes", "scales", "lengths", "value_scales", "own_scales")
    states = {name: getattr(cache, name) for name in names}
    return replace(cache, **{name: None if each is None else each[rows] for name, each in states.items()})


def compared(cache, plan, work, output):
    """How far a step's answers are from plain torch's, relative, over the first and the last sequence; and the share of
    tokens that was read.
    """
    differences, sizes, counts = 0.0, 0.0, work.scratch.counts.view(len(output), -1)
    for index in sorted({0, len(output) - 1}):
        one = slice(index, index + 1)
        expected = scored_step.attend_selected(work.rotated[one], part(cache, one), plan, SCALING)
        differences += float((output[one].float() - expected.output.float()).square().sum())
        sizes += float(expected.output.float().square().sum())
        apart = (counts[index] - expected.read[0].sum(-1)).abs() / counts[index]
        if float(apart.max()) > TOLERANCE:
            raise SystemExit(f"{counts[index].tolist()} tokens are read: nothing is measured")
    error = (differences / sizes) ** 0.5
    if not error <= TOLERANCE:
        raise SystemExit(f"answers differ by {error:.1%}: nothing is measured")
    return error, float(counts.float().mean() / cache.lengths[0])


def fastest_dense(batch, length):
    """Name and seconds of the fastest dense attention that is installed, and those of all others."""
    layers = max(1, min(MOST_LAYERS, LEAST_BYTES // (4 * batch * length * KV_HEADS * DIM) + 1))
    query = torch.randn(batch, HEADS, DIM, dtype=DTYPE, device="cuda")
    shape, found = (batch, KV_HEADS, length, DIM), {}
    states = [[torch.randn(shape, dtype=DTYPE, device="cuda") for _ in range(2)] for _ in range(layers)]
    for name, make in BASELINES.items():
        try:
            runs = [make(query, *each) for each in states]
            runs[0]()
        except (ImportError, OSError, AttributeError, RuntimeError) as reason:
            print(f"{name}: {str(reason).splitlines()[0] if str(reason) else type(reason).__name__}")
            continue
        found[name] = seconds_of(partial(all_of, runs)) / layers
        del runs
        torch.cuda.empty_cache()
    name = min(found, key=found.get)
    return {"name": name, "seconds": found[name], "all": found}


def all_of(runs):
    """One after the other."""
    for run in runs:
        run()


if __name__ == "__main__":
    try:
        main()
    except AquaError as error:
        raise SystemExit(f"error: {error}") from error
