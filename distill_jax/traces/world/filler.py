"""Sentences that say nothing about the question: they give rich documents length, words and entropy."""

import re

from distill_jax.traces.world.draw import Draw, words

_ADJECTIVES = words(
    "ancient bright broken busy calm careful cheap clean clever cloudy cold common crooked curious damp dark deep "
    "distant dry dusty early eastern elegant empty enormous faded fair famous fertile flat foggy fragile frozen "
    "gentle grand gray heavy hidden hollow humble icy idle late lively local lonely loud low magnificent marble "
    "mild modern modest muddy narrow neat noisy northern obscure odd old ordinary pale peculiar plain pleasant "
    "polished proud quaint quiet rainy rare restless rich rough round rusty sandy scattered shallow sharp silent "
    "simple slender slow small smooth soft southern spacious splendid steady steep stern still stout strange "
    "sturdy subtle sunny swift tall tidy tiny unusual vast warm weathered western wide wild winding windy wintry "
    "wooden worn")
_NOUNS = words(
    "abbey alley anchor arch attic avenue balcony bank barn barrel basin bay bell bench boat border bottle "
    "boulder brick canal candle canvas carpet castle cathedral cellar chapel chimney clock coast column copper "
    "corner cottage courtyard crane creek crossing curtain dam desk ditch dock door estate factory fence ferry "
    "festival field fireplace fleet forge fountain furnace gallery garden garret gateway glacier granary guild "
    "hall hamlet harbour hearth hedge highway hill hut inn island jetty kiln kitchen ladder lagoon lake lane "
    "lantern ledge library lighthouse lodge loft manor map market marsh meadow mill mine mirror monument mosaic "
    "museum orchard oven palace parade park pasture path pavilion pier pillar plain plank plaza pond porch prison "
    "quarry quay railway ramp ravine reef reservoir ridge river road roof ruin school shed shelf shop shore "
    "shrine silo square stable staircase station statue steeple stream street tavern temple terrace theatre "
    "threshold tower trail tunnel valley vault village vineyard wall warehouse watermill wharf windmill window "
    "workshop yard")
_VERBS = words(
    "adjoins borders brightens circles conceals crosses decorates divides dominates encloses faces flanks follows "
    "frames guards hides interrupts joins links marks meets mirrors neighbours overlooks passes protects reaches "
    "replaces resembles rivals separates serves shades shelters shields skirts supports surrounds touches "
    "transforms")
_TIMES = (
    "in spring", "in autumn", "every summer", "most winters", "after the flood", "before the war", "at dusk",
    "at dawn", "on feast days", "on Sundays", "for centuries", "since the fire", "to this day", "in good years",
    "when the snow melts", "during the fair", "by long custom", "according to visitors", "on old drawings",
    "for no clear reason")
_PATTERNS = (
    "The {a} {n} {v} the {m}.", "A {a} {n} {v} the {b} {m}.", "{T}, the {n} {v} a {b} {m}.",
    "The {n} {v} the {m} {t}.", "Visitors remember the {a} {n} and the {b} {m}.",
    "Nobody knows who built the {a} {n}.", "The {n} was painted {t}.", "A {n} stands beside the {b} {m} {t}.",
    "It is said that the {n} {v} the {m}.", "The {a} {m} was repaired {t}.", "There is a {a} {n} near the {m}.",
    "{T}, people gather at the {a} {n}.")


def articles(text: str) -> str:
    """`a elegant inn` -> `an elegant inn`."""
    return re.sub(r"\b([Aa]) ([aeiou])", r"\1n \2", text)


def sentence(draw: Draw) -> str:
    """One sentence, about 25 bits of choices."""
    time = draw.pick(_TIMES)
    text = draw.pick(_PATTERNS).format(
        a=draw.pick(_ADJECTIVES), b=draw.pick(_ADJECTIVES), n=draw.pick(_NOUNS), m=draw.pick(_NOUNS),
        v=draw.pick(_VERBS), t=time, T=time[0].upper() + time[1:])
    return articles(text)


def vocabulary() -> set[str]:
    """Every content word these sentences can use."""
    return {*_ADJECTIVES, *_NOUNS, *_VERBS}
