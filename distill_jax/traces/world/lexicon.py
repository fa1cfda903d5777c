"""The names a rendering can use."""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from distill_jax.traces.world.draw import digest, words
from distill_jax.traces.world.facts import Entity


@dataclass(frozen=True)
class Lexicon:
    """names: entity type -> names by index; no name contains another of its type, since answers are matched as
    substrings. uuids: types whose names are UUIDs, any number of them. A question is built within `sizes`."""

    names: Mapping[str, tuple[str, ...]]
    uuids: Mapping[str, int]

    @property
    def sizes(self) -> dict[str, int]:
        return {t: len(n) for t, n in self.names.items()} | dict(self.uuids)

    def name(self, entity: Entity) -> str:
        if entity.type in self.uuids:
            parts = [digest("uuid", *entity, half) for half in range(2)]
            return str(uuid.UUID(int=parts[0] << 64 | parts[1], version=4))
        return self.names[entity.type][entity.index]


def _joined(starts: str, ends: str) -> tuple[str, ...]:
    """Every start with every end, in an order whose every prefix is varied."""
    a, b = starts.split(), ends.split()
    return tuple(a[i] + b[(i + j) % len(b)] for j in range(len(b)) for i in range(len(a)))


_FIRST = words(
    "Anna Bela Carl Dina Emil Fred Gina Hugo Iris Jack Kate Liam Mona Nils Olga Paul Quinn Rosa Sven Tara Udo "
    "Vera Walt Xenia Yara Zeno Boris Clara Dario Edith Felix Greta Henri Jonas Karin Marta Noel Oscar Petra "
    "Rafael Sonja Tomas Ulla Viktor Wanda Adele Bruno Denis Elsa Fabio Gloria Hilde Igor Julia Kurt Lena Milo "
    "Nora Otto Pia Ralf Sylvie Theo Vito Agnes Basil Celia Doris Erik Gustav Helga Ivan Marek Klaus Lydia Moritz")
_LAST = _joined("Ash Black Brook Clay Dun East Fair Gold Hart Kings Lang North Oak Pem Rock Stone Thorn West Wood "
                "Wynd Birch Cold Elm Green Hazel Lock March Red Salt Wind",
                "bury by combe field ford ham ley man more son ton well wick worth brook croft dell grove hurst land")
_CITY = _joined("Alder Amber Barrow Brackel Colver Corven Dray Elver Fenner Garn Hallow Ister Jarrow Kester Lark "
                "Marlow Nether Orrin Penn Quarrel Raven Silver Tarn Ulver Vester Willow Yarrow Zell Bram Copper "
                "Dorn Ember Falk Grim Heather Iron",
                "bridge burg cliff dale fell gate haven holm mere mouth port shire stad stead view beck fort moor "
                "pass water")
_GOOD = words(
    "barley tea corn figs hops walnuts plums beets limes oats peas kale leeks pears wheat rice almonds apples "
    "apricots artichokes asparagus bananas basil beans blueberries broccoli cabbages carrots cashews cauliflower "
    "celery cherries chestnuts chillies cloves cocoa coffee cotton cranberries cucumbers currants fennel flax "
    "garlic ginger gooseberries grapes guavas hazelnuts hemp lavender lemons lentils lettuce lychees mangoes "
    "melons millet mint mulberries mushrooms mustard nectarines nutmeg olives onions oranges oregano papayas "
    "parsley parsnips peaches peanuts pecans peppers pistachios pomegranates poppies potatoes pumpkins quinces "
    "radishes raspberries rhubarb roses rye saffron sage sesame sorghum spinach squash strawberries sugar "
    "sunflowers thyme tobacco tomatoes tulips turnips vanilla yams")
_JOB = words(
    "baker miner pilot nurse judge tailor weaver farmer actor clerk mason potter guard smith scribe cook "
    "accountant architect astronomer barber bookbinder botanist brewer bricklayer butcher carpenter cartographer "
    "chemist conductor cooper courier dentist diver editor electrician engineer falconer fisherman florist "
    "gardener geologist glazier grocer historian hunter jeweller joiner journalist lawyer librarian mathematician "
    "mechanic midwife milliner musician notary optician painter pharmacist photographer physicist plumber poet "
    "porter postman printer professor roofer saddler sailor sculptor shepherd shoemaker singer surgeon surveyor "
    "tanner teacher translator upholsterer vintner watchmaker welder zoologist")
_PET = words(
    "cat dog hen goat pony crow hare toad duck mule fox owl wolf seal swan newt alpaca badger beaver budgie camel "
    "canary chinchilla cockatoo donkey dove ferret finch gecko gerbil goose hamster hawk hedgehog heron horse "
    "iguana jackdaw kestrel lamb lizard llama lynx macaw magpie marmot mole monkey mouse otter parrot peacock "
    "pheasant pig quail rabbit raven salamander sheep snail sparrow squirrel starling stork tortoise trout turkey "
    "turtle viper weasel yak zebra")

COMPACT = Lexicon({
    "person": tuple(n.lower() for n in _FIRST[:16]),
    "first": tuple(n.lower() for n in _FIRST[:16]),
    "city": words("oslo rome lima cairo paris delhi tokyo quito bern minsk dakar osaka hanoi turin leeds perth"),
    "good": _GOOD[:16],
    "job": _JOB[:16],
    "pet": _PET[:16],
    "source": words("registry letter rumor"),
    "year": tuple(str(y) for y in range(1980, 2000)),
    "key": tuple(f"{a} {b}" for a in "qwxyz" for b in "jkhuv"),
    "value": tuple(f"{a} {b}" for a in "12345" for b in "67890"),
}, uuids={})
"""One word, one token (keys and values are two)."""

RICH = Lexicon({
    "person": tuple(f"{_FIRST[i % len(_FIRST)]} {_LAST[(i // len(_FIRST) * 7 + i) % len(_LAST)]}"
                    for i in range(len(_FIRST) * 40)),
    "first": _FIRST,
    "city": _CITY,
    "good": _GOOD,
    "job": _JOB,
    "pet": _PET,
    "source": ("the town registry", "a private letter", "a rumour", "the church book", "the newspaper",
               "the tax office", "a travel guide", "the almanac"),
    "year": tuple(str(y) for y in range(1850, 2021)),
}, uuids={"key": 1 << 30, "value": 1 << 30})
"""Names for running text."""
