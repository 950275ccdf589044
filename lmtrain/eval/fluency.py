"""Fluency: what held-out text costs the model, and how text that it writes compares with it.

bits per byte   of the held-out rows that training scores, or of every file of --text; comparable across tokenizers
passages        pieces of that text as they are, with their sentences and with their words in another order: a model
                that knows the language finds each costlier than the one before. The bytes are the same
repetition, distinct-n, length   of what the model goes on with behind the beginnings of passages, beside what
                stands there in the text, cut to the same number of tokens (texts.py has the definitions)
"""

from __future__ import annotations

import math
import random

import numpy as np

from lmtrain.engine import Sampling
from lmtrain.eval import estimates, texts
from lmtrain.eval.likelihood import Pair, begin
from lmtrain.eval.subject import Missing, Result, Subject


def run(s: Subject) -> Result:
    """All of it; of a run without documents (chat alone) the held-out rows only."""
    result = Result()
    if not s.texts and s.held is not None:
        _rows(s, result)
    try:
        documents = s.documents("fluency")
    except Missing as why:
        if not result.scores:
            raise
        result.notes.append(str(why))
        return result
    for name, found in documents.items():
        if s.texts:
            _whole(s, name, found, result)
        _passages(s, name, found, result)
    return result


# --------------------------------------------------------------------------------------------------------- likelihood
def _rows(s: Subject, result: Result) -> None:
    """The held-out rows that training scores."""
    assert s.held is not None
    for side in s.held.heldout_rows(s.settings.rows):
        name, seed = f"held-out rows of {side.stage}", s.settings.seed
        with s.progress(len(side.picks), f"fluency: {name}") as progress:
            nats_R, tokens_R = s.likelihood.table(side.table, side.picks, progress)
        size_R = np.array([s.tokenizer.byte_lengths[side.table.targets(*pick)].sum() for pick in side.picks], float)
        result.scores[f"{name}: bits per byte"] = estimates.ratio(nats_R / math.log(2), size_R, seed, "bits")
        result.scores[f"{name}: nats a token"] = estimates.ratio(nats_R, tokens_R, seed, "nats")


def _whole(s: Subject, name: str, documents: list[str], result: Result) -> None:
    """A text of the user's own, in rows of as many tokens as the model sees, each token scored once."""
    pairs, size = [], []
    for document in documents:
        ids = [*begin(s.tokenizer), *s.tokenizer.encode(document)]
        for start in range(0, len(ids) - 1, s.longest):
            rest = ids[start + 1 : start + 1 + s.longest]
            pairs.append(([ids[start]], rest))
            size.append(float(s.tokenizer.byte_lengths[rest].sum()))
    keep = spread(len(pairs), s.settings.rows)
    with s.progress(len(keep), f"fluency: {name}") as progress:
        nats_R = [-scored.total for scored in s.likelihood([pairs[i] for i in keep], progress)]
    size_R = np.array([size[i] for i in keep])
    score = estimates.ratio(np.array(nats_R) / math.log(2), size_R, s.settings.seed, "bits")
    result.scores[f"{name}: bits per byte"] = score
    if len(keep) < len(pairs):
        result.notes.append(f"{name}: {len(keep):,} of its {len(pairs):,} rows of {s.longest} tokens are scored")


def _passages(s: Subject, name: str, documents: list[str], result: Result) -> None:
    found, cut = texts.passages(documents, s.tokenizer, s.longest)
    rng = random.Random(f"fluency {s.settings.seed}")
    kept = [found[i] for i in spread(len(found), s.settings.rows)]
    versions = []
    for p in kept:
        whole = p.context + p.continuation
        mixed = texts.shuffle_sentences([*p.pieces[: p.first], *p.sentences], rng)
        words = texts.shuffle_words(whole, rng)
        if mixed and words:
            versions.append((whole, mixed, words))
    if not versions:
        result.notes.append(f"{name}: no passage of three sentences fits into {s.longest} tokens; none was disturbed")
        return
    pairs: list[Pair] = [(begin(s.tokenizer), s.tokenizer.encode(text)) for some in versions for text in some]
    with s.progress(len(pairs), f"fluency: {name}, passages") as progress:
        bits = np.array([-scored.total / math.log(2) for scored in s.likelihood(pairs, progress)]).reshape(-1, 3)
    size_R = np.array([len(whole.encode()) for whole, _, _ in versions], float)
    seed = s.settings.seed
    for k, what in enumerate(("as they are", "sentences shuffled", "words shuffled")):
        result.scores[f"{name}: passages {what}"] = estimates.ratio(bits[:, k], size_R, seed, "bits")
        if k:
            more = estimates.ratio(bits[:, k] - bits[:, 0], size_R, seed, "bits")
            result.scores[f"{name}: passages {what}, costlier by"] = more
    if cut:
        result.notes.append(f"{name}: {texts.CUT}")
    _generated(s, name, kept, result)


# ---------------------------------------------------------------------------------------------------------- generated
def _generated(s: Subject, name: str, passages: list[texts.Passage], result: Result) -> None:
    contexts = [[*begin(s.tokenizer), *s.tokenizer.encode(p.context)][-s.longest // 2 :] for p in passages]
    real = [s.tokenizer.encode(p.continuation) for p in passages]
    out: dict[int, list[int]] = {}
    with s.progress(len(passages), f"fluency: {name}, generated") as progress:
        for i, (context, ids) in enumerate(zip(contexts, real, strict=True)):
            how = Sampling(len(ids), s.settings.temperature, stop=(s.tokenizer.end,), seed=s.settings.seed)
            s.engine.submit(context, how.numbered(i), tag=i)
        while s.engine.busy:
            for i, reply in s.engine.step(s.params):
                out[i] = reply.reply
                progress(1)
    written = [s.tokenizer.decode(out[i]) for i in range(len(passages))]
    result.notes.append(
        f"{name}: {len(written)} texts written at temperature {s.settings.temperature:g} behind the beginnings of "
        "passages, at most as many tokens as the text goes on with there"
    )
    for what, some in (("generated", written), ("the text itself", [p.continuation for p in passages])):
        measure(f"{name}, {what}", some, s.settings.seed, result)
    result.details[f"{name}, generated"] = written[:8]


def measure(name: str, some: list[str], seed: int, result: Result) -> None:
    """Length, repetition and distinct-n (n = 1 to 4) of texts, so that two sets of them can be compared."""
    found = [texts.words(text) for text in some]
    result.scores[f"{name}: words"] = estimates.mean([len(w) for w in found], seed, "words")
    for n in range(1, 5):
        values = [texts.repetition(w, n) for w in found]
        result.scores[f"{name}: repetition-{n}"] = estimates.share(values, seed)
    for n in range(1, 5):
        result.scores[f"{name}: distinct-{n}"] = estimates.of_whole(texts.Distinct(found, n), len(found), seed, "share")


def spread(count: int, limit: int) -> list[int]:
    """`limit` numbers below `count`, evenly spread; 0: all."""
    kept = min(limit or count, count)
    return [i * count // kept for i in range(kept)]
