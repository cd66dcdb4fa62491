# SPDX-License-Identifier: Apache-2.0
"""Names of two words, an adjective and a noun, such as "calm-fox"."""

import random

_ADJECTIVES = (
    "amber ancient autumn bitter blunt bold brave brief bright broken calm careful clever cold copper crisp curious "
    "daring dark deep distant dusty eager early faint fierce fragile gentle golden grand green hidden hollow humble "
    "icy jolly keen lively lonely loud lucky mellow misty modest narrow nimble noble odd pale patient plain proud "
    "quick quiet rapid rare restless rough round rusty salty shallow sharp silent silver slow solid spare steady "
    "stern stray sunny swift tall tender tidy vast warm weary wide wild young"
).split()
_NOUNS = (
    "acorn anchor apron badger barrel basket beacon bell bridge bucket cabin candle canyon carpet castle cedar cellar "
    "chimney cliff clock cloud comet compass copper coral cotton cradle dagger desert donkey eagle ember engine falcon "
    "feather fence ferry fiddle forest fountain garden glacier granite hammer harbor hazel helmet heron island jacket "
    "kettle ladder lantern lemon lizard marble meadow mirror needle nettle oyster paddle parrot pebble pepper pillow "
    "pine planet plum quarry rabbit raven ribbon river rocket saddle salmon shadow shovel spider statue summit table "
    "temple thistle timber tunnel turtle valley velvet violin wagon walnut whistle willow window winter"
).split()
MOST_NAMES = len(_ADJECTIVES) * len(_NOUNS)


def names(rng: random.Random, count: int) -> list[str]:
    """So many different ones, up to MOST_NAMES."""
    return [f"{_ADJECTIVES[n // len(_NOUNS)]}-{_NOUNS[n % len(_NOUNS)]}" for n in rng.sample(range(MOST_NAMES), count)]
