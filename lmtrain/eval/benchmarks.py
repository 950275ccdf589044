"""Published benchmarks of social bias, read from files of the user's own, as pairs of whole texts.

    crows_pairs   csv: sent_more, sent_less, bias_type                    Nangia et al. 2020, arXiv 2010.00133
    stereoset     json: data.intrasentence, data.intersentence            Nadeem et al. 2021, arXiv 2004.09456
    winogender    tsv: occupation, participant, answer, sentence          Rudinger et al. 2018, arXiv 1804.09301
    winobias      txt: pro_stereotyped...; anti_stereotyped... beside it  Zhao et al. 2018, arXiv 1804.06876
    bbq           jsonl                                                   Parrish et al. 2022, arXiv 2110.08193

The score of a text is log p(text) of the whole of it under the causal model, in nats, not divided by its length: what
lm-evaluation-harness's crows_pairs takes (its `likelihood_diff` and `pct_stereotype`). The pseudo-log-likelihood of
CrowS-Pairs' own paper masks one token at a time, which needs a masked model (Salazar et al. 2020, arXiv 1910.14659);
for a causal one the chain rule gives the likelihood itself.

    stereotype share     of the pairs in which the stereotyped text is the likelier one (a tie is half); 50 % is none
    stereotype margin    the mean of log p(stereotyped) - log p(other)
    language share       StereoSet's lms: how often a meaningful text beats the unrelated one

What "stereotyped" stands for elsewhere: Winogender the male pronoun against the female one; BBQ the answer that the
stereotype suggests against the other person, behind context and question.
"""

from __future__ import annotations

import csv
import io
import json
import math
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lmtrain.eval import estimates
from lmtrain.eval.fluency import spread
from lmtrain.eval.likelihood import begin, encode_pair
from lmtrain.eval.subject import Result, Subject
from lmtrain.types import LmtrainError, nearest


class Item(NamedTuple):
    """A pair of texts: behind `context`, the stereotyped one, the other one, and a senseless one where there is one."""

    group: str
    more: str
    less: str
    context: str = ""
    unrelated: str = ""


# ------------------------------------------------------------------------------------------------------------ reading
def crows_pairs(path: str) -> list[Item]:
    """Its csv. sent_more stereotypes more, whatever stereo_antistereo says."""
    where = f"--bias crows_pairs={path}"
    rows = _table(_text(path, where), ",", ("sent_more", "sent_less", "bias_type"), where)
    return [Item(row["bias_type"], row["sent_more"], row["sent_less"]) for row in rows]


def stereoset(path: str) -> list[Item]:
    """Its json: within a sentence, and between two (then behind `context`)."""
    where = f"--bias stereoset={path}"
    data = _json(_text(path, where), where)
    found = []
    parts = data.get("data") if isinstance(data, dict) else None
    _fields(parts, ("intrasentence", "intersentence"), f"{where}: data", some=True)
    assert isinstance(parts, dict)
    for part in ("intrasentence", "intersentence"):
        for number, row in enumerate(parts.get(part, []), 1):
            here = f"{where}: {part} {number}"
            _fields(row, ("bias_type", "context", "sentences"), here)
            by = {}
            for sentence in row["sentences"]:
                _fields(sentence, ("gold_label", "sentence"), here)
                by[sentence["gold_label"]] = sentence["sentence"]
            _fields(by, ("stereotype", "anti-stereotype", "unrelated"), f"{here}: gold_label")
            context = row["context"].rstrip() + " " if part == "intersentence" else ""
            found.append(Item(row["bias_type"], by["stereotype"], by["anti-stereotype"], context, by["unrelated"]))
    return found


_PRONOUNS = {"$NOM_PRONOUN": ("he", "she"), "$POSS_PRONOUN": ("his", "her"), "$ACC_PRONOUN": ("him", "her")}


def winogender(path: str) -> list[Item]:
    """Its templates.tsv, filled in with male and with female pronouns. A group is whom the pronoun stands for."""
    where = f"--bias winogender={path}"
    names = ("occupation(0)", "other-participant(1)", "answer", "sentence")
    found = []
    for number, row in enumerate(_table(_text(path, where), "\t", names, where), 2):
        if row["answer"] not in ("0", "1"):
            raise LmtrainError(f"{where}, line {number}: answer is {row['answer']!r}, but takes 0 or 1.")
        text = row["sentence"].replace("$OCCUPATION", row[names[0]]).replace("$PARTICIPANT", row[names[1]])
        he, she = (_pronouns(text, i) for i in (0, 1))
        if he == she:
            takes = ", ".join(_PRONOUNS)
            raise LmtrainError(f"{where}, line {number}: the sentence has no place for a pronoun ({takes}).")
        who = ("of the occupation", "of the other participant")[int(row["answer"])]
        found.append(Item(f"he or she, {who}", he, she))
    return found


def _pronouns(text: str, which: int) -> str:
    for place, words in _PRONOUNS.items():
        text = text.replace(place, words[which])
    return text[:1].upper() + text[1:]


def winobias(path: str) -> list[Item]:
    """Lines of a pro-stereotyped file with those of the anti-stereotyped one of the same name; brackets taken off."""
    where = f"--bias winobias={path}"
    name = pathlib.Path(path).name
    if "pro_stereotyped" not in name:
        raise LmtrainError(f"{where}: takes the file whose name has pro_stereotyped in it; anti_stereotyped is beside.")
    other = str(pathlib.Path(path).with_name(name.replace("pro_stereotyped", "anti_stereotyped")))
    sides = [[_plain(line) for line in _text(file, where).splitlines() if line.strip()] for file in (path, other)]
    if len(sides[0]) != len(sides[1]):
        raise LmtrainError(f"{where}: has {len(sides[0])} lines and {other} {len(sides[1])}; they are taken in pairs.")
    kind = re.search(r"type\d", name)
    group = kind[0] if kind else "gender"
    return [Item(group, more, less) for more, less in zip(*sides, strict=True) if more != less]


def _plain(line: str) -> str:
    return re.sub(r"[\[\]]", "", re.sub(r"^\s*\d+\s+", "", line)).strip()


def bbq(path: str) -> list[Item]:
    """Its jsonl. A group is a category, in ambiguous contexts (where no answer follows) and in others. Rows in which
    not just one of the two people is of a stereotyped group are left out."""
    where = f"--bias bbq={path}"
    needs = ("category", "context", "question", "context_condition", "question_polarity", "answer_info",
             "additional_metadata", "ans0", "ans1", "ans2")  # fmt: skip
    found = []
    for number, line in enumerate(_text(path, where).splitlines(), 1):
        if not line.strip():
            continue
        here = f"{where}, line {number}"
        row = _json(line, here)
        _fields(row, needs, here)
        _fields(row["additional_metadata"], ("stereotyped_groups",), here)
        groups = {str(group).lower() for group in row["additional_metadata"]["stereotyped_groups"]}
        tags = {ans: {str(tag).lower() for tag in row["answer_info"].get(ans, ())} for ans in ("ans0", "ans1", "ans2")}
        people = [ans for ans, tag in tags.items() if "unknown" not in tag]
        targets = [ans for ans in people if tags[ans] & groups]
        if len(people) != 2 or len(targets) != 1:
            continue
        target, other = targets[0], next(ans for ans in people if ans != targets[0])
        more, less = (target, other) if row["question_polarity"] == "neg" else (other, target)
        condition = "ambiguous" if row["context_condition"].startswith("ambig") else "disambiguated"
        context = f"{row['context']} {row['question']} "
        found.append(Item(f"{row['category']}, {condition}", row[more], row[less], context))
    return found


#: name -> what reads its file.
READERS: dict[str, Callable[[str], list[Item]]] = {
    f.__name__: f for f in (crows_pairs, stereoset, winogender, winobias, bbq)
}


def _text(path: str, where: str) -> str:
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise LmtrainError(f"{where}: {path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise LmtrainError(f"{where}: {path} is no UTF-8 text.") from None
    if not text.strip():
        raise LmtrainError(f"{where}: {path} is empty.")
    return text


def _table(text: str, delimiter: str, needs: tuple[str, ...], where: str) -> list[dict[str, str]]:
    if delimiter == "\t":  # no quoting: a quotation mark stands for itself
        table = [line.split("\t") for line in text.splitlines() if line.strip()]
    else:
        table = [row for row in csv.reader(io.StringIO(text)) if row]
    _fields(dict.fromkeys(table[0]), needs, where)
    rows = [dict(zip(table[0], row, strict=False)) for row in table[1:]]
    for number, row in enumerate(rows, 2):
        if any(not row.get(name) for name in needs):
            raise LmtrainError(f"{where}, row {number}: lacks {next(name for name in needs if not row.get(name))}.")
    return rows


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise LmtrainError(f"{where}: no JSON ({error}).") from None


def _fields(value: Any, needs: tuple[str, ...], where: str, some: bool = False) -> None:
    """Refuses what is no object with these fields (`some`: with one of them)."""
    if not isinstance(value, dict):
        raise LmtrainError(f"{where}: an object with {', '.join(needs)} was expected, got {type(value).__name__}.")
    lacks = [name for name in needs if name not in value]
    if lacks and not (some and len(lacks) < len(needs)):
        names = [str(name) for name in value]
        raise LmtrainError(
            f"{where}: has no {lacks[0]!r}.{nearest(lacks[0], names)} (it has {', '.join(names[:12]) or 'nothing'})"
        )


# ------------------------------------------------------------------------------------------------------------ scoring
def run(s: Subject, name: str, items: list[Item], result: Result) -> None:
    """Adds the scores of a benchmark to a result: of all of it, and of every group."""
    if not items:
        raise LmtrainError(f"--bias {name}: no row of it can be used.")
    kept = [items[i] for i in spread(len(items), s.settings.rows)]
    if len(kept) < len(items):
        result.notes.append(f"{name}: {len(kept):,} of its {len(items):,} pairs; --rows 0 takes all")
    texts = [(item.context, text) for item in kept for text in (item.more, item.less, item.unrelated) if text]
    pairs = [
        encode_pair(s.tokenizer, context, text) if context else (begin(s.tokenizer), s.tokenizer.encode(text))
        for context, text in texts
    ]
    with s.progress(len(pairs), f"bias: {name}") as progress:
        scored = iter(s.likelihood(pairs, progress))
    nats = [[next(scored).total for text in (item.more, item.less, item.unrelated) if text] for item in kept]
    margin_R = np.array([x[0] - x[1] for x in nats])
    seed = s.settings.seed
    groups = sorted({item.group for item in kept})
    for group in ["", *groups] if len(groups) > 1 else [""]:
        rows = [i for i, item in enumerate(kept) if not group or item.group == group]
        label = f"{name}, {group or groups[0] if len(groups) == 1 or group else 'all'}"
        wins_R = (1 + np.sign(margin_R[rows])) / 2
        result.scores[f"{label}: stereotype share"] = estimates.share(wins_R, seed)
        result.scores[f"{label}: stereotype margin"] = estimates.mean(margin_R[rows], seed, "nats")
        bits_R = [-sum(nats[i][:2]) / math.log(2) for i in rows]
        bytes_R = [len((kept[i].more + kept[i].less).encode()) for i in rows]
        result.scores[f"{label}: bits per byte"] = estimates.ratio(bits_R, bytes_R, seed, "bits")
        if all(kept[i].unrelated for i in rows):
            sense_R = [float(np.mean([x > nats[i][2] for x in nats[i][:2]])) for i in rows]
            result.scores[f"{label}: language share"] = estimates.share(sense_R, seed)
    result.details[name] = [{"group": item.group, "margin": m} for item, m in zip(kept, margin_R.tolist(), strict=True)]
