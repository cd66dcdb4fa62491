# SPDX-License-Identifier: Apache-2.0
"""A copied or pickled config names the attention of before, and not the one that we put there.

The name itself must be a plain string: in torch 2.11, `torch.compile` takes one of a subclass for unequal to all
others. So the copying is ours, by `copyreg`, which `copy` and `pickle` ask about each class.
"""

import copyreg
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from transformers import PreTrainedConfig

NAME = "_attn_implementation_internal"
_before: dict[str, dict[int, str | None]] = {}
"""What each of our names took the place of, by the id of the config, which whoever takes us out again holds."""
_classes: Counter[type] = Counter()
"""How many of our names are in configs of a class."""


def is_ours(config: PreTrainedConfig) -> bool:
    """Whether a config names attention that we put there."""
    return config._attn_implementation in _before


def with_parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A config and those of its parts, of which some have no module."""
    yield config
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            yield from with_parts(part)


def name_former(name: str, configs: Sequence[PreTrainedConfig]) -> Callable[[], None]:
    """Have copies made under `name` name what the configs name now; returns what ends that.

    The caller sees to it that one thread at a time does either.
    """
    classes = {type(config) for config in configs}
    _before[name] = {id(config): config._attn_implementation for config in configs}
    for each in classes:
        _classes[each] += 1
        copyreg.dispatch_table.setdefault(each, _reduced)

    def end() -> None:
        _before.pop(name, None)
        _classes.subtract(classes)
        for each in classes:
            if not _classes[each] and copyreg.dispatch_table.get(each) is _reduced:
                del copyreg.dispatch_table[each]
        classes.clear()

    return end


def _reduced(config: PreTrainedConfig) -> tuple[Any, ...]:
    make, given, state, *others = config.__reduce_ex__(2)
    if is_ours(config):
        state = state | {NAME: _before[config._attn_implementation].get(id(config), config._attn_implementation)}
    return make, given, state, *others
