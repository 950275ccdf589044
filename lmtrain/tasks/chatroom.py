"""A simulated chat room: a scripted user asks about a place, and the model answers from what it was told.

    system     Lopa: river Vemi, tower Suka, dish Gorun.
    user       Hi, Tine here. Which river has Lopa?
    assistant  The river Vemi.
    user       Thanks. Which tower?
    ...
    user       Thanks, bye!
    assistant  Bye, Tine!

The user asks for one fact after another, asks again where the answer was not given, says so where it was off the topic
or said before, and ends with a goodbye. Everything it says is a function of the row and of what the model said. The
names of facts and people are forty words, those of places any number; a place that is held out is in no conversation of
training. It takes reading what was told, and a demonstration says a fact just as it was told ("river Vemi"), for
the sake of small models: 0.84M parameters then gave a third of the facts after SFT (experiments/chatroom.py); none
where names were new each time and the reply was "The river is Vemi."
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from lmtrain.tasks import rewards, words
from lmtrain.tasks.generated import Generated, Message, Row, assistant, number

KINDS = ("river", "tower", "dish", "king", "tree", "song", "game", "lake")
MOODS = ("kind", "curt", "merry")
_OPENINGS = (
    "Hi, {name} here. Which {kind} has {topic}?",
    "{name} here. What is the {kind}?",
    "Hello from {name}! The {kind} of {topic}?",
)
_THANKS = {"kind": "Thanks. ", "curt": "", "merry": "Great! "}
_NEXT = ("Which {kind}?", "And the {kind}?")
_BYE = {"kind": "Thanks, bye!", "curt": "Bye.", "merry": "Great, bye!"}
_OFF = ("I like soup.", "It is late.", "What a day!")  # what a sloppy demonstration says
LOW, HIGH = 5, 40  # characters of a reply that is neither too short nor too long


@dataclasses.dataclass(frozen=True)
class _Turn:
    """One reply, as the user sees it."""

    reply: str
    asked: str  # the kind of fact that was asked for; "" for a goodbye
    given: bool  # that fact and no other
    on_topic: bool
    repeated: bool


class Chatroom(Generated):
    """Conversations of `turns` replies: one for each of up to three facts, and a goodbye.

    Args:
      sloppy: share of the demonstrations that go wrong once or twice: they repeat themselves, or leave the topic. What
        is learned from those leaves RL something to improve.
    """

    name = "chatroom"
    max_tokens = 48

    def __init__(self, turns: int = 4, seed: int = 0, sloppy: float = 0.0):
        super().__init__(seed, sloppy)
        self.turns = number("turns", turns, 1, 32)
        known = random.Random(f"{self.name} words")  # the same under every seed
        self.words = [word.capitalize() for word in words.several(known, 40, 2, 0.0) if word not in KINDS]

    # ---------------------------------------------------------------- problems

    def draw(self, rng: random.Random) -> Row:
        name, *values = rng.sample(self.words, 4)
        topic = name
        while topic in self.words or topic.lower() in KINDS:  # "lake" could be one
            topic = words.word(rng, 2).capitalize()
        facts = dict(zip(rng.sample(KINDS, 3), values, strict=True))
        mood = rng.choice(MOODS)
        asks = rng.sample(list(facts), 3)
        return {
            "name": name, "topic": topic, "facts": facts, "asks": asks, "mood": mood, "style": rng.randrange(1 << 30),
            "persona": f"You are {name}, {mood}. Ask about {topic}: {', '.join(asks)}. Then say bye.",
        }  # fmt: skip

    def problem(self, row: Row) -> str:
        return row["topic"]

    def messages(self, row: Row) -> list[Message]:
        told = ", ".join(f"{kind} {value}" for kind, value in row["facts"].items())
        opening = _OPENINGS[row["style"] % len(_OPENINGS)]
        asked = opening.format(kind=row["asks"][0], **{k: row[k] for k in ("name", "topic")})
        return [{"role": "system", "content": f"{row['topic']}: {told}."}, {"role": "user", "content": asked}]

    # ---------------------------------------------------------------- the user

    def respond(self, row: Row, messages: Sequence[Message]) -> list[Message] | None:
        """The user's next line; None after the goodbye's answer, or after `turns` replies."""
        turns = _read(row, messages)
        if not turns or not turns[-1].asked or len(turns) >= self.turns:
            return None
        kind = self._next(row, turns)
        if not kind:
            return [{"role": "user", "content": _BYE[row["mood"]] if turns[-1].given else "Bye."}]
        question = _NEXT[(row["style"] + len(turns)) % len(_NEXT)].format(kind=kind)
        if turns[-1].given:
            said = _THANKS[row["mood"]]
        elif turns[-1].repeated:
            said = "You said that. "
        else:
            said = "No. " if turns[-1].on_topic else f"Stay with {row['topic']}. "
        return [{"role": "user", "content": said + question}]

    def _next(self, row: Row, turns: Sequence[_Turn]) -> str:
        """The fact to ask for next: the first not given; "" (a goodbye) where all were, or one reply is left."""
        given = {turn.asked for turn in turns if turn.given}
        left = [kind for kind in row["asks"] if kind not in given]
        return left[0] if left and (not turns or len(turns) < self.turns - 1) else ""

    # ---------------------------------------------------------------- what it is worth

    def score_conversation(self, row: Row, messages: Sequence[Message]) -> dict[str, float]:
        """Parts, each 0 to 1.

        Returns:
          on_topic: share of the replies that name the place, a fact or its kind; to a goodbye, that say goodbye.
          no_repetition: share that were not said before, times the share of different words within a reply.
          length: share within 5 to 40 characters, less the further they are from it.
          facts: share of the facts there was time to ask for that were given in reply to the question.
        """
        turns = _read(row, messages)
        count = max(1, len(turns))
        wanted = max(1, min(len(row["asks"]), self.turns - 1))
        return {
            "on_topic": sum(turn.on_topic for turn in turns) / count,
            "no_repetition": sum(not turn.repeated and _different(turn.reply) for turn in turns) / count,
            "length": sum(rewards.band(len(turn.reply.strip()), LOW, HIGH) for turn in turns) / count,
            "facts": min(1.0, len({turn.asked for turn in turns if turn.given}) / wanted),
        }

    def score(self, row: Row, reply: str) -> float:
        """Of a first reply alone: 1 where it gives the fact that the opening asks for, in 40 characters or fewer."""
        first = _read(row, [*self.messages(row), *assistant(reply)])[0]
        return float(first.given and len(reply.strip()) <= HIGH)

    # ---------------------------------------------------------------- a demonstration

    def solution(self, row: Row) -> list[Message]:
        return self._demonstration(row, self.sloppy)

    def preference(self, row: Row) -> dict[str, list[Message]]:
        """A demonstration without a slip, and one with: what a reward model learns to tell apart."""
        return {"chosen": self._demonstration(row, 0.0), "rejected": self._demonstration(row, 1.0)}

    def _demonstration(self, row: Row, sloppy: float) -> list[Message]:
        rng = random.Random(f"{self.seed} {row['topic']} {row['style']}")
        turns = min(self.turns, 4)  # three facts and a goodbye; more is left for who needs it
        slips = set(rng.sample(range(turns), min(turns, rng.randint(1, 2)))) if rng.random() < sloppy else ()
        talk = list(self.messages(row))
        prompt = len(talk)
        said: list[str] = []
        for turn in range(self.turns):
            asked = _asked(row, talk[-1]["content"])
            reply = f"The {asked} {row['facts'][asked]}." if asked else f"Bye, {row['name']}!"
            if turn in slips:
                reply = said[-1] if said and rng.random() < 0.5 else rng.choice(_OFF)
            said.append(reply)
            talk += assistant(reply)
            answer = self.respond(row, talk)
            if answer is None:
                break
            talk += answer
        return talk[prompt:]


def _asked(row: Row, line: str) -> str:
    """The kind of fact that a user's line asks for; "" for none: a goodbye."""
    said = rewards.words(line)
    return next((kind for kind in row["asks"] if kind in said), "")


def _read(row: Row, messages: Sequence[Message]) -> list[_Turn]:
    """The replies of a conversation, judged in order, whoever played the user."""
    turns: list[_Turn] = []
    about = {word.lower() for word in (row["topic"], *row["facts"], *row["facts"].values())}
    values = {value.lower() for value in row["facts"].values()}
    asked = ""
    for message in messages:
        if message["role"] == "user":
            asked = _asked(row, message["content"])
        if message["role"] != "assistant":
            continue
        reply = "" if message.get("truncated") else message["content"]  # what was cut is never worth anything
        said = rewards.words(reply)
        turns.append(
            _Turn(
                reply=reply,
                asked=asked,
                given=bool(asked) and values.intersection(said) == {row["facts"][asked].lower()},
                on_topic=bool((about if asked else {"bye", "goodbye"}).intersection(said)),
                repeated=any(rewards.words(turn.reply) == said for turn in turns),
            )
        )
    return turns


def _different(reply: str) -> float:
    """Different words of a reply as a share of all."""
    found = rewards.words(reply)
    return len(set(found)) / len(found) if found else 0.0
