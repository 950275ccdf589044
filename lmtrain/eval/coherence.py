"""Coherence: does what was said before tell the model what comes next?

A discourse test on held-out passages (texts.py). The model is given the context, and scores the true continuation
against three others:

    words shuffled, sentences shuffled   the true one in another order
    foreign                              what goes on elsewhere: in another document (in a text of one document, in
                                         another part of it), of about the same length

A passage is won where the true one costs fewer nats a token; a tie is half a win, and chance wins 50 %. The margin is
the mean of the difference. The *pointwise* margin is that of log p(continuation | context) - log p(continuation): what
the context alone adds, so that a foreign text which is merely likelier by itself does not win (as in pointwise mutual
information; Holtzman et al. 2021, arXiv 2104.08315).

For a model that chats, the task `consistency` besides (tasks/consistency.py): the same question twice in one
conversation, and a fact that is asked for later.
"""

from __future__ import annotations

import random

import numpy as np

from lmtrain import tasks
from lmtrain.eval import estimates, texts
from lmtrain.eval import tasks as played_lib
from lmtrain.eval.fluency import spread
from lmtrain.eval.likelihood import Pair, begin, encode_pair
from lmtrain.eval.subject import Missing, Result, Subject
from lmtrain.types import LmtrainError

OTHERS = ("words shuffled", "sentences shuffled", "foreign")
LOOKED_AT = 64  # passages elsewhere, of which the one nearest in length is taken


def run(s: Subject) -> Result:
    """The discourse test, and for a model that chats its consistency."""
    result = Result()
    try:
        documents = s.documents("coherence")
    except Missing as why:
        if not s.chat:
            raise
        result.notes.append(str(why))
        documents = {}
    for name, found in documents.items():
        _discourse(s, name, found, result)
    if documents and not result.scores:
        raise Missing("suite coherence: " + "; ".join(result.notes))
    if s.chat:
        _consistency(s, result)
    else:
        result.notes.append("consistency is for models that chat; --format chat asks this one too")
    return result


# ---------------------------------------------------------------------------------------------------------- discourse
def _discourse(s: Subject, name: str, documents: list[str], result: Result) -> None:
    found, cut = texts.passages(documents, s.tokenizer, s.longest)
    rng = random.Random(f"coherence {s.settings.seed}")
    made = []
    for i in spread(len(found), s.settings.rows):
        others = disturbed(found, i, rng)
        if all(others):
            made.append((found[i], [found[i].continuation, *others]))
    if not made:
        result.notes.append(
            f"{name} has no passage of three sentences that fits into the {s.longest} tokens that the model sees, or no"
            " second one to compare it with: give more text, or a longer --row-length"
        )
        return
    pairs: list[Pair] = []
    for passage, continuations in made:
        for text in continuations:
            context, ids = encode_pair(s.tokenizer, passage.context, text)
            pairs += [(context, ids), (begin(s.tokenizer), ids)]
    with s.progress(len(pairs), f"coherence: {name}") as progress:
        scored = s.likelihood(pairs, progress)
    given_RC = np.array([x.mean for x in scored[0::2]]).reshape(len(made), -1)
    alone_RC = np.array([x.mean for x in scored[1::2]]).reshape(len(made), -1)
    gained_RC = given_RC - alone_RC
    for c, what in enumerate(OTHERS, start=1):
        for kind, values_RC in (("", given_RC), ("pointwise ", gained_RC)):
            margin_R = values_RC[:, 0] - values_RC[:, c]
            wins = estimates.share((1 + np.sign(margin_R)) / 2, s.settings.seed)
            result.scores[f"{name}, against {what}: {kind}wins"] = wins
            margin = estimates.mean(margin_R, s.settings.seed, "nats")
            result.scores[f"{name}, against {what}: {kind}margin"] = margin
    if cut:
        result.notes.append(f"{name}: {texts.CUT}")
    several = len({passage.document for passage in found}) > 1
    where = "another document" if several else "another part of the only document"
    result.notes.append(f"{name}: margins are in nats a token; the foreign continuation is from {where}")
    result.details[name] = [
        {"context": p.context, "continuation": p.continuation, "foreign": c[3], "margins": (g[:1] - g[1:]).tolist()}
        for (p, c), g in list(zip(made, given_RC, strict=True))[:8]
    ]


def disturbed(found: list[texts.Passage], i: int, rng: random.Random) -> list[str]:
    """What the true continuation of passage i is compared with, in OTHERS' order; "" where there is none."""
    true = found[i]
    return [
        texts.shuffle_words(true.continuation, rng),
        texts.shuffle_sentences(true.sentences, rng),
        foreign(found, true, rng),
    ]


def foreign(found: list[texts.Passage], true: texts.Passage, rng: random.Random) -> str:
    """How a passage elsewhere goes on, for as many sentences as come nearest in length. "" where there is none."""
    elsewhere = [p for p in found if p.document != true.document]
    if not elsewhere:
        elsewhere = [p for p in found if abs(p.number - true.number) > 1]
    looked = rng.sample(elsewhere, min(LOOKED_AT, len(elsewhere)))
    there = ["".join(p.sentences[:k]).rstrip() for p in looked for k in range(1, len(p.sentences) + 1)]
    size = len(true.continuation.encode())
    others = (text for text in there if text != true.continuation)
    return min(others, key=lambda text: abs(len(text.encode()) - size), default="")


# -------------------------------------------------------------------------------------------------------- consistency
def _consistency(s: Subject, result: Result) -> None:
    task = tasks.get(f"consistency(about={_about(s)!r})")
    rows = min(s.settings.rows or 1 << 30, len(task.rows("heldout")))
    with s.progress(rows, "coherence: consistency") as progress:
        played = played_lib.score(
            s.engine, s.params, s.template(), task, rows=rows, temperature=0.0, longest=s.longest,
            seed=s.settings.seed, progress=progress,
        ).played  # fmt: skip
    says = {"again": "the same question twice, the same answer", "recall": "a fact told first is known later"}
    for kind, what in says.items():
        values = [e.scores[kind] for e in played if kind in e.scores]
        if values:
            result.scores[f"consistency: {what}"] = estimates.share(values, s.settings.seed)
    result.notes.append(f"consistency: conversations of three turns about {_about(s)}, by the likeliest tokens")
    result.details["consistency"] = [
        {"messages": e.messages, "scores": e.scores} for e in played[:8]
    ]  # fmt: skip


def _about(s: Subject) -> str:
    """The task whose problems the conversations are about: the first single-question one that is known."""
    for spec in (*s.settings.tasks, *(s.record.tasks() if s.record else ())):
        try:
            task = tasks.get(spec)
            if not hasattr(task, "respond") and len(task.rows("train")):
                return spec
        except LmtrainError:
            continue  # a file for evaluation alone has no training side
    return "addition"
