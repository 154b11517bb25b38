"""Names and numbers that no text holds by accident: keys, values and coded words."""

from random import Random
from string import ascii_lowercase

ADJECTIVES = """
amber ancient bitter blunt brave brisk bronze calm cedar clever cobalt coral crimson curious dusty eager early
electric faint fierce foggy frozen gentle gilded golden hidden hollow humble icy idle ivory jolly keen lavish lazy
linen little lively lonely loud lucky marble mellow misty modest narrow nimble noble olive pale patient placid polar
proud quiet rapid rough rusty sandy silent silver sleepy slender smooth solid stormy sturdy sudden sunny swift
tender timid velvet vivid wild windy wooden young
""".split()

NOUNS = """
acorn anchor apron arrow attic badger barrel basket beacon bishop blanket boulder bridge bucket button cabin candle
canyon carpet castle cellar chapel cherry comet copper cottage cradle crater cricket curtain dagger desert donkey
dragon engine falcon feather fiddle forest fountain garden glacier goblet hammer harbor hatchet helmet island jacket
jungle kettle kitten ladder lantern lemon lizard magnet meadow mirror monkey napkin needle orchard otter paddle
parrot pebble pepper pillow pirate pocket prairie puddle quarry rabbit raven ribbon saddle sailor scarf shadow
spider spoon statue summit teapot temple thimble ticket tiger timber tower tractor trumpet tunnel turtle valley
violin walnut whistle window winter wizard
""".split()


def keys(count: int, draw: Random) -> list[str]:
    """Distinct names such as `calm-otter`; with a number behind when there are more than adjectives and nouns give."""
    pairs = len(ADJECTIVES) * len(NOUNS)
    return [_key(index) for index in draw.sample(range(max(pairs, count)), count)]


def _key(index: int) -> str:
    number, pair = divmod(index, len(ADJECTIVES) * len(NOUNS))
    name = f"{ADJECTIVES[pair % len(ADJECTIVES)]}-{NOUNS[pair // len(ADJECTIVES)]}"
    return f"{name}-{number}" if number else name


def number(digits: int, draw: Random) -> str:
    """A number of this many digits."""
    return str(draw.randrange(10 ** (digits - 1), 10**digits))


def coded(count: int, letters: int, draw: Random) -> list[str]:
    """Distinct words of random letters."""
    words: set[str] = set()
    while len(words) < count:
        words.add("".join(draw.choices(ascii_lowercase, k=letters)))
    return draw.sample(sorted(words), count)
