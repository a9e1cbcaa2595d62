"""The training conversations of the embedded story model: a seeded generator of our own.

``conversations(seed)`` is an endless, deterministic stream of chats.  A fifth of the 1,500 combinations of
character, moral and setting (``held_out()``) never occurs in it, in any phrasing, turn or example.

    python tools/stories/corpus.py --count 5
"""

import argparse
import functools
import random
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grammar
import smalltalk

SPLIT_SEED = 20
HELD_OUT_SHARE = 0.2


class Combo(NamedTuple):
    """What a story is about."""

    character: str
    moral: str
    setting: str


class Message(NamedTuple):
    """One chat message."""

    role: str
    content: str


Conversation = tuple[Message, ...]

ALL_COMBOS = tuple(Combo(c, m, s) for c in grammar.CHARACTERS for m in grammar.MORALS for s in grammar.SETTINGS)


@functools.cache
def held_out() -> tuple[Combo, ...]:
    """The 300 combinations that training never sees, in a fixed order."""
    return tuple(random.Random(SPLIT_SEED).sample(ALL_COMBOS, round(len(ALL_COMBOS) * HELD_OUT_SHARE)))


@functools.cache
def training_combos() -> tuple[Combo, ...]:
    """Every combination that is not held out."""
    hidden = frozenset(held_out())
    return tuple(combo for combo in ALL_COMBOS if combo not in hidden)


def template_request(combo: Combo) -> str:
    """The documented request for `combo`."""
    return smalltalk.TEMPLATE.format(c=combo.character, m=combo.moral, s=combo.setting)


_ALTERNATIVES = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{(\w+)\}")


def expand(rng: random.Random, pattern: str) -> str:
    """`pattern` with one alternative of every ``[a|b]`` picked, innermost first."""
    while True:
        expanded = _ALTERNATIVES.sub(lambda match: rng.choice(match[1].split("|")), pattern)
        if expanded == pattern:
            return expanded
        pattern = expanded


class Teller:
    """Tells one story: keeps its name, place, helper and friend the same from sentence to sentence."""

    def __init__(self, rng: random.Random, combo: Combo) -> None:
        self._rng = rng
        self._moral = combo.moral
        self._char = combo.character
        girl = rng.random() < 0.5
        self._name = rng.choice(grammar.GIRLS if girl else grammar.BOYS)
        pronouns = ("she", "her", "her", "herself") if girl else ("he", "him", "his", "himself")
        self._elder = rng.choice(grammar.ELDERS)
        self._pal = rng.choice([pal for pal in grammar.PALS if pal.split()[0] != self._name])
        self._met: set[str] = set()
        self._fixed = dict(zip(("he", "him", "his", "himself"), pronouns, strict=True)) | {
            "He": pronouns[0].capitalize(),
            "name": self._name,
            "char": combo.character,
            "moral": combo.moral,
            "setting": combo.setting,
            "place": rng.choice(grammar.PLACES[combo.setting]),
            "habit": rng.choice(grammar.HABITS[combo.setting]),
            "treat": rng.choice(grammar.TREATS),
            "thing": rng.choice(grammar.THINGS),
            "when": rng.choice(grammar.WHENS),
            "thanks": rng.choice(grammar.THANKS),
        }

    def _elder_now(self) -> str:
        """The helper: "an old owl" first, "the old owl" afterwards."""
        if "elder" in self._met:
            return "the " + self._elder.split(" ", 1)[1]
        self._met.add("elder")
        return self._elder

    def _pal_now(self) -> str:
        """The friend: "Wren the otter" first, "Wren" afterwards."""
        if "pal" in self._met:
            return self._pal.split()[0]
        self._met.add("pal")
        return self._pal

    def _hero_now(self) -> str:
        """The hero, mostly by name, often by kind, so that a story names its character more than once."""
        return self._rng.choices((self._name, f"the {self._char}", f"the little {self._char}"), (5, 4, 1))[0]

    def _fill(self, match: re.Match[str]) -> str:
        slot = match[1]
        if slot in self._fixed:
            return self._fixed[slot]
        if slot == "hero":
            return self._hero_now()
        if slot == "pal":
            return self._pal_now()
        if slot == "folk":
            folk = ("the neighbors", "the others", "{his} friends", "the animals of the {setting}")
            return _SLOT.sub(self._fill, self._rng.choice(folk))
        elder = self._elder_now()
        return elder + "'s" if slot == "elder_s" else elder

    def say(self, pattern: str) -> str:
        """One sentence (or two) from `pattern`, capitalized."""
        text = expand(self._rng, pattern.replace("{worth}", grammar.WORTH[self._moral]))
        text = _SLOT.sub(self._fill, text)
        return text[0].upper() + text[1:]


def tell_story(rng: random.Random, combo: Combo, brief: bool = False) -> str:
    """One paragraph about `combo`, which it names literally: character and setting early, the moral at the end.

    A `brief` one is only a beginning and an end: a lesson in naming what was asked for.
    """
    teller = Teller(rng, combo)
    if brief:
        beginning = rng.choice(grammar.MORAL_FIRST if rng.random() < 0.3 else grammar.OPENINGS)
        return f"{teller.say(beginning)} {teller.say(rng.choice(grammar.CLOSINGS))}"
    scene = rng.choice(grammar.SCENES[combo.moral])
    patterns = [rng.choice(grammar.MORAL_FIRST if rng.random() < 0.15 else grammar.OPENINGS)]
    if rng.random() < 0.3:
        patterns.append(rng.choice(grammar.DETAILS))
    patterns += [rng.choice(scene.problem), rng.choice(scene.wrong)]
    if rng.random() < 0.3:
        patterns.append(rng.choice(grammar.FEELINGS))
    patterns += [rng.choice(scene.turn), rng.choice(scene.good)]
    if rng.random() < 0.25:
        patterns.append(rng.choice(grammar.REACTIONS))
    closings = rng.sample(grammar.CLOSINGS, 2)
    patterns += closings[: 2 if rng.random() < 0.15 else 1]
    return " ".join(teller.say(pattern) for pattern in patterns)


def roughen(rng: random.Random, text: str) -> str:
    """`text` as somebody might type it in a hurry."""
    if rng.random() < 0.25:
        text = text.lower()
    if rng.random() < 0.2:
        text = text.rstrip(".!?")
    if rng.random() < 0.06:
        text = rng.choice(("pls ", "please ", "hey, ", "Hi! ", "Hello! ", "ok, ", "so, ")) + text
    if rng.random() < 0.04:
        text = text.upper()
    if rng.random() < 0.08:
        text += rng.choice((" please", " thanks", " :)", "!!", " Thank you!", " Keep it short.", " Use simple words."))
    return text


def _fill_request(rng: random.Random, pattern: str, combo: Combo) -> str:
    phrase = rng.choice(smalltalk.MORAL_PHRASES[combo.moral])
    parts = {"c": combo.character, "m": combo.moral, "s": combo.setting, "p": phrase}
    return _SLOT.sub(lambda match: parts[match[1]], expand(rng, pattern))


def story_request(rng: random.Random, combo: Combo) -> str:
    """A request for `combo`: the template, a paraphrase, or one that leaves parts open."""
    kind = rng.random()
    if kind < 0.3:
        text = template_request(combo)
        return roughen(rng, text) if rng.random() < 0.3 else text
    pattern = rng.choice(smalltalk.FULL_REQUESTS if kind < 0.82 else smalltalk.PARTIAL_REQUESTS)
    return roughen(rng, _fill_request(rng, pattern, combo))


def polite_answer(rng: random.Random, kind: str) -> str:
    """What the model says when it is not asked for a story it can tell."""
    offer = _fill_request(rng, rng.choice(smalltalk.OFFERS), rng.choice(training_combos()))
    parts = (rng.choice(smalltalk.LEADS[kind]), rng.choice(smalltalk.IDENTITIES), offer)
    return " ".join(part for part in parts if part)


def gibberish(rng: random.Random) -> str:
    """Random letters, digits or characters of any script."""
    pools = ("abcdefghijklmnopqrstuvwxyz", "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOP0123456789!?#$%&*-_=+", "")
    words = []
    for _ in range(rng.randint(1, 8)):
        pool = rng.choice(pools)
        length = rng.randint(1, 9)
        if pool:
            words.append("".join(rng.choice(pool) for _ in range(length)))
        else:
            words.append("".join(chr(rng.choice((rng.randint(0xA1, 0x24F), rng.randint(0x391, 0x4FF),
                                                 rng.randint(0x4E00, 0x9FFF)))) for _ in range(length)))  # fmt: skip
    return " ".join(words)


def word_salad(rng: random.Random, low: int, high: int) -> str:
    """Sentences of common words, for long texts that only have to be read past."""
    words = rng.choices(smalltalk.WORDS, k=rng.randint(low, high))
    for start in range(0, len(words), 12):
        words[start] = words[start].capitalize()
        words[start - 1] += "."
    return " ".join(words)


def other_text(rng: random.Random) -> tuple[str, str]:
    """A user message that is no story request, and the kind of polite answer it gets."""
    kind = rng.choices(
        ("greeting", "thanks", "who", "question", "order", "hero", "code", "maths", "foreign", "gibberish", "long"),
        (10, 6, 10, 26, 14, 8, 7, 7, 6, 4, 4),
    )[0]
    simple = {"greeting": smalltalk.GREETINGS, "thanks": smalltalk.THANKS, "who": smalltalk.WHO}
    if kind in simple:
        return roughen(rng, rng.choice(simple[kind])), kind
    if kind == "gibberish":
        return rng.choice((gibberish(rng), gibberish(rng), "", " ".join(rng.choices(smalltalk.WORDS, k=3)))), "other"
    if kind == "long":
        return word_salad(rng, 10, 120), "other"
    if kind == "foreign":
        return rng.choice(smalltalk.FOREIGN), "other"
    patterns = {"question": smalltalk.QUESTIONS, "order": smalltalk.ORDERS, "hero": smalltalk.OTHER_STORIES,
                "code": smalltalk.CODE, "maths": smalltalk.MATHS}[kind]  # fmt: skip
    pattern = rng.choice(patterns)
    if kind != "code":
        pattern = expand(rng, pattern)

    def fill(match: re.Match[str]) -> str:
        choices: dict[str, Sequence[str]] = {"t": (*smalltalk.TOPICS, *smalltalk.WORDS[100::7]), "w": smalltalk.WORDS,
                                             "h": smalltalk.OTHER_HEROES, "m": grammar.MORALS,
                                             "s": grammar.SETTINGS}  # fmt: skip
        return str(rng.randint(0, rng.choice((9, 99, 9999)))) if match[1] == "n" else rng.choice(choices[match[1]])

    text = _SLOT.sub(fill, pattern).replace("{{", "{").replace("}}", "}")
    return roughen(rng, text), "other"


def follow_up(rng: random.Random, before: Combo) -> tuple[str, Combo]:
    """A request that leans on the story before it, and the combination it asks for."""
    while True:
        # A new pattern for every try: what one keeps may be found in held-out combinations only.
        keep, pattern = rng.choice(smalltalk.FOLLOW_UPS)
        fresh = rng.choice(training_combos())
        combo = Combo(
            before.character if "c" in keep else fresh.character,
            before.moral if "m" in keep else fresh.moral,
            before.setting if "s" in keep else fresh.setting,
        )
        if combo != before and combo in _training_set():
            return roughen(rng, _fill_request(rng, pattern, combo)), combo


@functools.cache
def _training_set() -> frozenset[Combo]:
    return frozenset(training_combos())


def conversation(rng: random.Random, brief: float = 0.0) -> Conversation:
    """One chat of one to seven exchanges; now and then a bare story without a chat (roles: ``text``).

    `brief` is the share of chats whose stories are brief.
    """
    short = rng.random() < brief
    if rng.random() < 0.03:
        return (Message("text", tell_story(rng, rng.choice(training_combos()), short)),)
    messages: list[Message] = []
    if rng.random() < 0.15:
        system = word_salad(rng, 20, 400) if rng.random() < 0.06 else rng.choice(smalltalk.SYSTEM_PROMPTS)
        messages.append(Message("system", system))
    turns = 1 if rng.random() < 0.85 else rng.choices((2, 3, 4, 5, 6, 7), (8, 4, 2, 1, 1, 1))[0]
    combo: Combo | None = None
    for _ in range(turns):
        kind = rng.random()
        if kind < 0.24:
            text, answer = other_text(rng)
            messages += (Message("user", text), Message("assistant", polite_answer(rng, answer)))
            continue
        if combo is not None and kind < 0.7:
            text, combo = follow_up(rng, combo)
        else:
            combo = rng.choice(training_combos())
            text = story_request(rng, combo)
        messages += (Message("user", text), Message("assistant", tell_story(rng, combo, short)))
    return tuple(messages)


def conversations(seed: int, brief: float = 0.0) -> Iterator[Conversation]:
    """The endless corpus for `seed`, with a share of `brief` chats."""
    rng = random.Random(seed)
    while True:
        yield conversation(rng, brief)


def main() -> None:
    """Print the first conversations of a seed."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=5)
    options = parser.parse_args()
    for _, chat in zip(range(options.count), conversations(options.seed), strict=False):
        for message in chat:
            print(f"{message.role}: {message.content}")
        print()


if __name__ == "__main__":
    main()
