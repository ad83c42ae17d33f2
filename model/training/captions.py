"""Sentences such as describe a picture: who does what to what, and where.

    python -m model.training.captions OUT.jsonl [--most 60000]

The other sources are dictionaries, manuals and speeches; what people do, wear and hold is in none
of them. A text to distil on need not be true, only of the kind that is asked for: the teacher
says what it means. Written by a grammar of our own words, so no text is anybody's. Knows no
tensors and no files to read.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from model import console
from model.training.sources import SEED


def _words(text: str) -> list[str]:
    """The parts between commas, without line breaks."""
    return [" ".join(part.split()) for part in text.split(",")]


_ONE = dict(
    pair.split("/")
    for pair in _words(
        """man/men, woman/women, boy/boys, girl/girls, child/children, person/people, kid/kids,
        baby/babies, lady/ladies, guy/guys, player/players, student/students, worker/workers,
        dancer/dancers, cyclist/cyclists, surfer/surfers, skateboarder/skateboarders,
        musician/musicians, cook/cooks, climber/climbers, skier/skiers, runner/runners,
        tourist/tourists, couple/couples"""
    )
)
_BEAST = dict(
    pair.split("/")
    for pair in _words(
        """dog/dogs, cat/cats, horse/horses, puppy/puppies, kitten/kittens, bird/birds, cow/cows,
        sheep/sheep, monkey/monkeys, elephant/elephants, panda/pandas, rabbit/rabbits, lion/lions,
        tiger/tigers, hamster/hamsters, turtle/turtles"""
    )
)
_OF_PEOPLE = _words("young, old, elderly, tall, bearded, blond, smiling, little, barefoot")
_OF_BEASTS = _words("small, large, black, white, brown, wet, spotted, tan, baby, big")
_COUNT = _words("two, three, several, some, four, a group of, many, a few, five")
_COLOUR = _words("red, blue, green, yellow, black, white, pink, orange, grey, purple")
_WORN = _words("shirt, jacket, hat, dress, coat, uniform, swimsuit, scarf, helmet, T-shirt")
_MATTER = _words("wooden, old, large, small, new, broken, shiny, long, plastic, metal")


@dataclass(frozen=True, slots=True)
class _Deed:
    """ing, third person, participle, and what it is done to ("" of none)."""

    ing: str
    third: str
    done: str
    things: tuple[str, ...] = ("",)


def _deeds(text: str) -> list[_Deed]:
    """Of lines "ing third done: thing, thing"; what is done to nothing has no colon."""
    found = []
    for line in text.strip().splitlines():
        forms, _, things = line.partition(":")
        ing, third, done = (form.replace("_", " ") for form in forms.split())
        found.append(_Deed(ing, third, done, tuple(_words(things))))
    return found


_OF_PERSONS = _deeds("""
playing plays played: guitar, piano, flute, violin, drums, harp, trumpet, cello
playing plays played: football, soccer, basketball, tennis, baseball, chess, cards, golf, hockey
riding rides ridden: bicycle, horse, motorcycle, scooter, skateboard, bus, elephant, camel, wave
driving drives driven: car, truck, tractor, van, race car
cutting cuts cut: onion, carrot, tomato, potato, piece of paper, cake, loaf of bread, melon
slicing slices sliced: onion, cucumber, lemon, tomato, mushroom, pepper, piece of meat
peeling peels peeled: potato, apple, orange, banana, shrimp, egg
cooking cooks cooked: meal, fish, rice, soup, pasta, piece of chicken, egg
mixing mixes mixed: dough, batter, salad, sauce, bowl of vegetables
pouring pours poured: water, milk, oil, sauce, coffee, wine
eating eats eaten: sandwich, apple, bowl of soup, slice of pizza, cake, ice cream, banana
drinking drinks drunk: water, coffee, tea, beer, juice, glass of milk
holding holds held: baby, camera, umbrella, flag, box, sign, rope, knife, microphone, balloon
carrying carries carried: bag, child, basket, surfboard, ladder, box, backpack, stack of books
throwing throws thrown: ball, stone, stick, frisbee, snowball
catching catches caught: ball, fish, frisbee
kicking kicks kicked: ball, door
reading reads read: book, newspaper, letter, map, magazine
writing writes written: letter, note, name, word
painting paints painted: picture, wall, fence, face
washing washes washed: car, dish, window, dog, hand
opening opens opened: door, box, present, window, bottle
closing closes closed: door, window, book, drawer
pushing pushes pushed: cart, stroller, wheelchair, swing
pulling pulls pulled: sled, wagon, rope, cart
climbing climbs climbed: tree, ladder, rock, wall, mountain, rope
feeding feeds fed: baby, dog, horse, bird, duck
petting pets petted: dog, cat, horse, tiger
brushing brushes brushed: hair, teeth, horse
fixing fixes fixed: bicycle, roof, engine, lamp, computer
taking takes taken: picture, photograph of the sea, nap
buying buys bought: fruit, ticket, newspaper, bread
building builds built: house, sand castle, fence, wall
lifting lifts lifted: weight, box, child, car
folding folds folded: sheet of paper, shirt, towel
firing fires fired: gun, rifle, pistol
""")
_OF_ALL = _deeds("""
running runs run
jumping jumps jumped
walking walks walked
sitting sits sat
standing stands stood
swimming swims swum
sleeping sleeps slept
resting rests rested
playing plays played
lying lies lain
looking_up looks_up looked_up
waiting waits waited
turning_around turns_around turned_around
""")
_PERSONS_ALONE = _deeds("""
dancing dances danced
singing sings sung
talking talks talked
laughing laughs laughed
smiling smiles smiled
crying cries cried
skiing skis skied
surfing surfs surfed
kneeling kneels knelt
skating skates skated
fishing fishes fished
exercising exercises exercised
clapping claps clapped
cheering cheers cheered
working works worked
studying studies studied
praying prays prayed
hiking hikes hiked
camping camps camped
bowing bows bowed
""")
_OF_BEASTS_DEEDS = _deeds("""
chasing chases chased: ball, cat, bird, mouse, stick, car
eating eats eaten: grass, piece of bread, fish, carrot, leaf, bone
carrying carries carried: stick, ball, toy, bone, newspaper
licking licks licked: plate, hand, bottle, baby
watching watches watched: television, bird, boat, fire
biting bites bitten: shoe, ball, stick, rope
drinking drinks drunk: water, milk
""")
_INSTRUMENTS = _OF_PERSONS[0].things
_MANY = ("cards", "drums", "teeth")
_UNCOUNTED = frozenset(
    _words(
        """football, soccer, basketball, tennis, baseball, chess, cards, golf, hockey, volleyball,
        drums, rice, soup, pasta, dough, batter, sauce, salad, water, milk, oil, coffee, wine, cake,
        bread, juice, tea, beer, hair, teeth, television, grass, fruit, ice cream"""
    )
)
_PLACE = _words(
    """in the park, on the beach, in the snow, in the kitchen, on the street, in a field,
    near a lake, in the water, on a bench, under a tree, on the grass, in front of a building,
    at night, in the rain, on a stage, in a crowded room, next to a car, on the roof, by the river,
    in the garden, at a table, on a couch, in the desert, behind a fence, through the woods,
    across the road, on a mountain, in a boat, at the station, in the sun, beside a pool,
    on the sand, in the mud, at school, in the office, outside, indoors, with friends,
    along the shore, near the window"""
)
_SCENE = _words(
    """car, boat, train, plane, bicycle, bus, house, tree, bridge, table, chair, truck, tent,
    clock, statue, fountain, bed, motorcycle, flower, sign, kite"""
)
_STATE = _words("is parked, is standing, can be seen, is lying, is being painted, is being moved")


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiouAEIO' else 'a'} {words}"


def _object(thing: str, rng: random.Random) -> str:
    if not thing or thing in _UNCOUNTED:
        return thing
    if rng.random() < 0.25:
        thing = f"{rng.choice(_MATTER + _COLOUR)} {thing}"
    return f"the {thing}" if rng.random() < 0.25 else _a(thing)


def _subject(
    kinds: dict[str, str], adjectives: Sequence[str], rng: random.Random
) -> tuple[str, bool]:
    """(who, whether they are many)."""
    one = rng.choice(list(kinds))
    many = rng.random() < 0.3
    noun = kinds[one] if many else one
    if rng.random() < 0.4:
        noun = f"{rng.choice(adjectives)} {noun}"
    if many:
        who = f"{rng.choice(_COUNT)} {noun}" if rng.random() < 0.8 else f"the {noun}"
    else:
        who = _a(noun) if rng.random() < 0.8 else f"the {noun}"
    if kinds is _ONE and rng.random() < 0.2:
        worn = rng.choice(_WORN)
        worn = f"{rng.choice(_COLOUR)} {worn}{'s' if many else ''}"
        who += f" in {worn}" if many else f" in {_a(worn)}"
    return who, many


def caption(rng: random.Random) -> str:
    """One sentence."""
    if rng.random() < 0.07:
        thing = f"{rng.choice(_COLOUR + _MATTER)} {rng.choice(_SCENE)}"
        return _sentence(f"{_a(thing)} {rng.choice(_STATE)} {rng.choice(_PLACE)}", rng)
    persons = rng.random() < 0.75
    who, many = _subject(_ONE, _OF_PEOPLE, rng) if persons else _subject(_BEAST, _OF_BEASTS, rng)
    acting = rng.random() < 0.65
    if acting:
        deed = rng.choice(_OF_PERSONS if persons else _OF_BEASTS_DEEDS)
    else:
        deed = rng.choice(_OF_ALL + _PERSONS_ALONE if persons else _OF_ALL)
    thing = rng.choice(deed.things)
    if thing in _INSTRUMENTS and thing not in _UNCOUNTED:
        what = f"the {thing}" if rng.random() < 0.5 else _a(thing)
    else:
        what = _object(thing, rng)
    where = rng.choice(_PLACE) if rng.random() < (0.3 if acting else 0.8) else ""
    are = "are" if many else "is"
    form = rng.random()
    if what and form < 0.15:
        is_done = "are" if thing in _MANY else "is"
        text = f"{what} {is_done} being {deed.done} by {who} {where}"
    elif form < 0.22:
        text = f"{who} {are} not {deed.ing} {what} {where}"
    elif form < 0.27 and not many and who.startswith(("a ", "an ")):
        text = f"there is no {who.partition(' ')[2]} {deed.ing} {what} {where}"
    elif form < 0.4:
        text = f"{who} {deed.ing} {what} {where}"
    elif form < 0.5 and not many:
        text = f"{who} {deed.third} {what} {where}"
    elif form < 0.58:
        second = rng.choice([deed.ing for deed in _OF_ALL + (_PERSONS_ALONE if persons else [])])
        text = f"{who} {are} {deed.ing} {what} and {second} {where}"
    else:
        text = f"{who} {are} {deed.ing} {what} {where}"
    return _sentence(text, rng)


def _sentence(text: str, rng: random.Random) -> str:
    text = " ".join(text.split())
    return text[0].upper() + text[1:] + ("." if rng.random() < 0.6 else "")


def captions(most: int, rng: random.Random) -> list[str]:
    """So many different sentences."""
    found: dict[str, None] = {}
    while len(found) < most:
        found.setdefault(caption(rng))
    return list(found)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write sentences such as describe a picture.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--most", type=int, default=60_000, help="texts (default: %(default)s)")
    arguments = parser.parse_args()
    texts = captions(arguments.most, random.Random(SEED))  # noqa: S311
    with arguments.out.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": t, "source": "captions"}) + "\n" for t in texts)
    print(f"{len(texts)} texts in {arguments.out}")


if __name__ == "__main__":
    sys.exit(console.run("captions", main))
