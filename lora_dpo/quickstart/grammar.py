"""The words and sentence shapes of the story world.

A shape is a format string; `world.py` fills its slots. Shapes are grouped by the place in the
story they serve and by mood, and `tests/quickstart/test_world.py` holds each shape to its mood:
read by the true reward, a kind shape votes +1, an unkind one -1 and a plain one 0.

Slots: NA "Mia the fox", N "Mia", S one of "She", "Mia", "The fox"; he, his, him by gender;
animal; ao "a lost lantern", o "lantern"; goal, going, past phrases which fit the object;
FA and F the friend; place "by the river", to "to the river"; day, weather, food, small;
ka, kf, kd a kind trait, feeling, adverb; ua, uf, ud the unkind ones.
"""

from __future__ import annotations


def _words(text: str) -> list[str]:
    return text.split()


GIRLS = _words("Mia Lily Ruby Nora Ella Rosa Zoe Ivy Anna Clara Daisy Hazel Maya Nina Pia Tess")
BOYS = _words("Tom Ben Max Leo Sam Finn Oscar Hugo Jack Otto Rory Theo Bruno Felix Gus Milo")

ANIMALS = _words(
    """fox bear rabbit mouse owl cat dog duck frog goat hen horse
otter badger squirrel turtle wolf lamb pony crow beaver hedgehog mole panda"""
)
SMALL_ANIMALS = ["snail", "beetle", "sparrow", "bee", "spider", "ant"]

OBJECTS = _words(
    """lantern drum clock bell kettle cup boat cart flute basket key teapot mirror
whistle wagon spoon bucket ladder trumpet compass wheel puppet lamp box"""
)

ADJECTIVES = {
    "lost": ["lost", "missing", "hidden", "forgotten"],
    "broken": ["broken", "cracked", "dusty", "wobbly"],
    "treasure": ["golden", "silver", "shiny", "painted", "tiny", "blue", "red"],
}

PLOT_PHRASES = {
    "lost": {
        "goal": ["find {ao}", "look for {ao}", "search for {ao}"],
        "going": ["looking for {ao}", "searching for {ao}", "thinking about {ao}"],
        "past": ["heard about {ao}", "dreamed of {ao}", "wanted to find {ao}"],
    },
    "broken": {
        "goal": ["mend {ao}", "fix {ao}", "work on {ao}"],
        "going": ["mending {ao}", "working on {ao}", "carrying {ao}"],
        "past": ["had {ao}", "found {ao}", "wanted to fix {ao}"],
    },
    "treasure": {
        "goal": ["fetch {ao}", "try out {ao}", "see {ao}"],
        "going": ["carrying {ao}", "playing with {ao}", "cleaning {ao}"],
        "past": ["found {ao}", "bought {ao}", "was given {ao}"],
    },
}

REQUESTS = [
    "Tell me a story about {NA} and {ao}.",
    "Please tell me a short story about {NA} and {ao}.",
    "Write a little story about {NA} and {ao}.",
    "I would like a story about {NA} and {ao}.",
    "Can you tell a story about {NA} and {ao}?",
    "What happened to {NA} and {ao}?",
]

PLACES = [
    ("by the river", "to the river"),
    ("in the barn", "to the barn"),
    ("on the hill", "up the hill"),
    ("at the market", "to the market"),
    ("near the mill", "to the mill"),
    ("under the bridge", "under the bridge"),
    ("in the garden", "to the garden"),
    ("on the beach", "to the beach"),
    ("in the forest", "into the forest"),
    ("by the lake", "around the lake"),
    ("in the village", "to the village"),
    ("at the school", "to the school"),
    ("in the kitchen", "to the kitchen"),
    ("behind the church", "past the church"),
    ("in the meadow", "across the meadow"),
    ("near the old tower", "to the old tower"),
    ("at the station", "to the station"),
    ("by the well", "to the well"),
    ("in the cave", "into the cave"),
    ("at the castle", "to the castle"),
]

DAYS = [
    f"{start} {sky}{part}"
    for start in ("One", "Early one")
    for sky in ("", "windy ", "rainy ", "snowy ", "foggy ", "quiet ")
    for part in ("morning", "evening")
] + ["Last winter", "Last summer", "Long ago", "On Monday", "On Sunday"]

WEATHER = [
    "The rain was falling",
    "The wind was blowing",
    "The snow was deep",
    "The fog was thick",
    "The sun was hot",
    "The moon was high",
    "Leaves were falling",
]

FOODS = ["bread", "soup", "cake", "honey", "nuts", "berries", "cheese", "apples", "porridge", "pie"]

KIND_SLOTS = {
    "ka": _words("brave caring cheerful friendly generous gentle helpful kind patient polite"),
    "kf": _words("calm delighted glad happy joyful merry proud thankful"),
    "kd": _words("cheerfully gently gladly happily kindly politely sweetly warmly"),
}
UNKIND_SLOTS = {
    "ua": _words("bossy cruel greedy mean nasty rude selfish spiteful stubborn unkind"),
    "uf": _words("angry bitter gloomy grumpy jealous lonely miserable sad"),
    "ud": _words("angrily bitterly coldly crossly meanly rudely sadly spitefully"),
}

Shapes = dict[str, list[str]]

OPENING: Shapes = {
    "plain": [
        "{day}, {NA} set out to {goal}.",
        "{NA} {past} {place}.",
        "{day}, {NA} was {going} {place}.",
        "There was once a {animal} named {N} who {past}.",
        "{day}, {NA} {past}.",
        "{weather}, but {NA} still went out to {goal}.",
        "{weather} when {NA} went {to} to {goal}.",
    ],
    "kind": [
        "{day}, a {ka} {animal} named {N} set out to {goal}.",
        "{N} was a {ka} {animal} who {past}.",
        "{NA} was {kf} because {he} {past}.",
        "{day}, {NA} {kd} went out to {goal}.",
        "With a smile, {NA} went {to} to {goal}.",
        "{weather}, but {NA} felt {kf} and set out to {goal}.",
        "{NA} hummed {kd} while {he} was {going}.",
    ],
    "unkind": [
        "{day}, a {ua} {animal} named {N} set out to {goal}.",
        "{N} was a {ua} {animal} who {past}.",
        "{NA} was {uf} because {he} had to {goal}.",
        "{day}, {NA} {ud} went out to {goal}.",
        "{NA} woke up {uf} and did not want to {goal}.",
        "{weather}, and {NA} felt {uf} and did not want to {goal}.",
        "{NA} complained {ud} while {he} was {going}.",
        "{NA} stomped {to} to {goal}.",
    ],
}

PLOT_ACTS = {
    "lost": [
        "{S} looked under every stone {place}.",
        "{S} followed some footprints {to}.",
        "{S} asked a {small} about the {o}.",
        "{S} drew a map and walked {to}.",
    ],
    "broken": [
        "{S} took out some string, some glue and a hammer.",
        "{S} carried the {o} {to} in a bag.",
        "The {o} needed new paint and two new screws.",
        "{S} turned the {o} over and looked inside.",
    ],
    "treasure": [
        "{S} put the {o} in a bag and walked {to}.",
        "{S} held the {o} up to the light.",
        "{S} showed the {o} to a {small} {place}.",
        "The {o} made a strange sound in the wind.",
    ],
}

ACT: Shapes = {
    "plain": [],  # the plot decides: see PLOT_ACTS
    "kind": [
        "{S} {kd} sang a song on the way {to}.",
        "{S} stayed {kf} even when the wind began to blow.",
        "{S} laughed when a {small} landed on {his} nose.",
        "{S} shared some {food} with a hungry {small}.",
        "{S} helped an old {small} cross the road.",
        "A {small} cheered as {N} walked {to}.",
        "{S} was {ka} and did not give up.",
        "{S} danced {place} and felt {kf}.",
        "The path {to} was warm and lovely.",
    ],
    "unkind": [
        "{S} {ud} threw a stone on the way {to}.",
        "{S} stayed {uf} even when the sun began to shine.",
        "{S} yelled when a {small} landed on {his} nose.",
        "{S} grabbed some {food} from a hungry {small}.",
        "{S} kicked an old {small} off the road.",
        "A {small} hid as {N} growled and walked {to}.",
        "{S} was {ua} and soon gave up.",
        "{S} sulked {place} and felt {uf}.",
        "There was only trouble on the path {to}.",
    ],
}

SKY: Shapes = {
    "plain": [
        "Then it began to rain {place}.",
        "Then the wind moved the leaves {place}.",
        "Clouds came over the trees.",
        "The moon rose over the roofs.",
        "By noon the snow had stopped.",
    ],
    "kind": [
        "Then the sun came out, and everyone felt {kf}.",
        "A warm wind came over the trees.",
        "The stars came out, and {he} looked up with joy.",
        "The evening {place} was lovely.",
    ],
    "unkind": [
        "Then a storm came, and everyone felt {uf}.",
        "Rain and tears ran down {his} face.",
        "The night came, and {he} walked on in anger.",
        "The evening {place} was gloomy.",
    ],
}

MEET: Shapes = {
    "plain": [
        "Then {FA} came along with some {food}.",
        "Soon {FA} stopped to ask about the {o}.",
        "Just then {FA} came down the path.",
        "{FA} was sitting {place} with some {food}.",
        "After a while {he} saw {FA} {place}.",
        "On the way {he} met {FA}.",
    ],
    "kind": [
        "Then {FA} smiled and asked about the {o}.",
        "{FA} {kd} gave {him} some {food}.",
        "Soon {he} met {FA}, who was {ka} and {kf}.",
        "{FA} hugged {him} and asked about the {o}.",
        "On the way {he} made a new friend, {FA}.",
        "{FA} invited {him} to sit down and eat some {food}.",
        "Then {FA} came along and was {ka} to {him}.",
    ],
    "unkind": [
        "Then {FA} teased {him} about the {o}.",
        "{FA} {ud} told {him} to go away.",
        "Soon {he} met {FA}, who was {ua} and {uf}.",
        "{FA} pushed {him} into the mud.",
        "On the way {he} had a quarrel with {FA}.",
        "{FA} snapped at {him} and ate all the {food}.",
        "Then {FA} came along and was {ua} to {him}.",
    ],
}

TALK: Shapes = {
    "plain": [
        '"I have seen that {o} before," said {F}.',
        "{F} talked about the {o} for a long time.",
        '"Let us go {to}," said {F}.',
        "{N} and {F} walked {to}.",
        '"It is getting late," said {N}.',
        "{F} had a story about the {o} too.",
    ],
    "kind": [
        '"You can have my {food}," said {F} {kd}.',
        '"I am {kf} that you came," said {N}.',
        "{N} thanked {F}, and they sat down together.",
        '"You are a {ka} {animal}," said {F}.',
        "{F} praised {N} for being so {ka}.",
        "{F} comforted {N} and told a funny story.",
        "{N} and {F} became friends.",
        '"We will do it together," said {F} {kd}.',
    ],
    "unkind": [
        '"You can not have my {food}," said {F} {ud}.',
        '"I am {uf} that you came," said {N}.',
        "{N} blamed {F}, and they walked home alone.",
        '"You are a {ua} {animal}," said {F}.',
        "{F} scolded {N} for being so {ua}.",
        "{F} lied to {N} about the {o}.",
        "{N} and {F} had a fight.",
        '"Go away," shouted {F}.',
    ],
}

PLOT_ENDINGS: dict[str, Shapes] = {
    "lost": {
        "plain": [
            "At last the {o} was there, under a tree {place}.",
            "In the end the {o} was back on its shelf.",
        ],
        "kind": [
            "At last the {o} was found, and {N} was {kf}.",
            "{N} found the {o} and gave it back with love.",
        ],
        "unkind": [
            "The {o} was never found, and {N} was {uf}.",
            "{N} never found the {o} and cried all night.",
        ],
    },
    "broken": {
        "plain": [
            "By evening the {o} was as good as new.",
            "In the end {N} left the {o} {place}.",
        ],
        "kind": [
            "In the end the {o} was mended, and {N} was {kf}.",
            "{N} mended the {o} and gave it away as a gift.",
        ],
        "unkind": [
            "The {o} could not be mended, and {N} was {uf}.",
            "{N} threw the {o} away and cried all night.",
        ],
    },
    "treasure": {
        "plain": [
            "That night the {o} stood by the window.",
            "In the end {N} put the {o} on a shelf.",
        ],
        "kind": [
            "In the end everyone played with the {o}, and {N} was {kf}.",
            "{N} gave the {o} to a child as a gift.",
        ],
        "unkind": [
            "In the end the {o} was gone, and {N} was {uf}.",
            "{N} hid the {o} from everyone and cried all night.",
        ],
    },
}

ENDING: Shapes = {
    "plain": ["Then {N} went home to bed.", "After that {N} went back {to}."],
    "kind": [
        "{N} went home {kf} and slept well.",
        "From then on {N} was {ka} to everyone {place}.",
        "Everyone {place} remembered the kindness of {N}.",
        "{N} forgave everyone and went home {kf}.",
    ],
    "unkind": [
        "{N} went home {uf} and could not sleep.",
        "From then on {N} was {ua} to everyone {place}.",
        "After so much trouble, nobody {place} wanted to see {N} again.",
        "{N} {ud} closed the door and went to bed.",
    ],
}
