# SPDX-License-Identifier: Apache-2.0
"""The functions of `ops` from plain tensors: most tests have a rotation, root mean squares of keys and settings."""

from __future__ import annotations

import functools

import torch

from aqua_attention.config import AquaConfig
from aqua_attention.ops import api, backend, mass, select
from aqua_attention.ops.plan import Call, LayerPlan

IMPLEMENTATIONS = ("auto", *backend.names())
TORCH_IMPLEMENTATIONS = ("auto", *backend.names(rotated=True))


# As in use: the plan of a layer is one object, made once.
plan_of = functools.lru_cache(maxsize=256)(LayerPlan.of)


def identity(num_key_value_heads, head_dim, kept, device):
    return torch.eye(head_dim, kept, device=device).expand(num_key_value_heads, head_dim, kept)


def attend(query, key, value, rotation, key_rms, config, *, impl="auto", **options):
    plan = plan_of(rotation, key_rms, config)
    if options.get("scaling") is None:
        options.pop("scaling", None)
    return api.attend(plan.call(query, key, value, **options), plan, impl).output


def choose(query, key, value, mask, *, window, softcap=None, s_aux=None, impl="auto"):
    plan = LayerPlan.of(identity(key.shape[1], query.shape[3], key.shape[3], query.device), None, AquaConfig.paper())
    call = Call(query, key, value, mask, int(window), 0, plan.scaling, softcap, s_aux)
    return backend.choose(call, plan, impl).name


def select_dimensions(query, config, head_dim, key_rms, scaling=None, short=None):
    rotation = identity(key_rms.shape[0], head_dim, query.shape[-1], query.device)
    return select.select_dimensions(query, LayerPlan.of(rotation, key_rms, config, scaling), short)


def gpu_decode_step(query, key, value, cache, rotation, key_rms, config, *, scaling=None):
    from aqua_attention.ops.backends.triton.step import decode_step

    plan = plan_of(rotation, key_rms, config, scaling)
    return decode_step(query, key, value, cache, plan, plan.scaling)


def cpu_decode_step(query, key, value, cache, rotation, key_rms, config, *, scaling=None):
    from aqua_attention.ops.backends.cpu.step import decode_step

    plan = plan_of(rotation, key_rms, config, scaling)
    return decode_step(query, key, value, cache, plan, plan.scaling)


def splits_of_short(query, cache, config):
    from aqua_attention.ops.backends.triton import step

    rotation = identity(cache.shape[1], query.shape[-1], cache.shape[2], query.device)
    return step.splits_of_short(query, cache, LayerPlan.of(rotation, None, config))


def prepare(query, key, value, cache, rotation, key_rms, config, *, scaling=None):
    from aqua_attention.ops.backends.triton import prepare as module

    plan = plan_of(rotation, key_rms, config, scaling)
    return module.prepare(query, key, value, cache, plan, plan.scaling)


def decode(query, chosen, cache, *, scaling=None, **options):
    from aqua_attention.ops.backends.triton import decode as module

    return module.decode(query, chosen, cache, scaling=default(scaling, query), **options)


def cpu_decode(query, chosen, cache, *, scaling=None, **options):
    from aqua_attention.ops.backends.cpu import decode as module

    return module.decode(query, chosen, cache, scaling=default(scaling, query), **options)


def default(scaling, query):
    return query.shape[-1] ** -0.5 if scaling is None else scaling


def rotate_and_narrow(query, rotation, key_rms, config, *, scaling=None, both=True):
    from aqua_attention.ops.backends.triton import rotate as module

    plan = plan_of(rotation, key_rms, config, scaling)
    return module.rotate_and_narrow(query, plan, plan.scaling, both=both)[:2]


def attention_prefill(query, key, value, rotation, key_rms, config, *, scaling=None):
    from aqua_attention.ops.backends.triton import prefill as module

    plan = plan_of(rotation, key_rms, config, scaling)
    return module.attention_prefill(plan.call(query, key, value), plan).output


def window_merge(query, key, value, far, far_lse, *, sink, recent, scaling):
    from aqua_attention.ops.backends.triton import window as module

    return module.window_merge(Call(query, key, value, None, sink, recent, scaling), far, far_lse)


def attention_mass(query, key, selected, counted, *, scaling=None, **options):
    return mass.attention_mass(query, key, selected, counted, scaling=default(scaling, query), **options)
