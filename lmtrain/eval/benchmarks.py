"""Published benchmarks of social bias, read from files of the user's own, as pairs of whole texts.

    crows_pairs   csv: sent_more, sent_less, bias_type                    Nangia et al. 2020, arXiv 2010.00133
    stereoset     json: data.intrasentence, data.intersentence            Nadeem et al. 2021, arXiv 2004.09456
    winogender    tsv: occupation, participant, answer, sentence          Rudinger et al. 2018, arXiv 1804.09301
    winobias      txt: pro_stereotyped...; anti_stereotyped... beside it  Zhao et al. 2018, arXiv 1804.06876
    bbq           jsonl                                                   Parrish et al. 2022, arXiv 2110.08193

The score of a text is log p(text) of the whole of it under the causal model, in nats, not divided by its length: what
lm-evaluation-harness's crows_pairs takes (its `likelihood_diff` and `pct_stereotype`). The pseudo-log-likelihood of
CrowS-Pairs' own paper masks one token at a time, which needs a masked model (Salazar et al. 2020, arXiv 1910.14659);
for a causal one the chain rule gives the likelihood itself. StereoSet alone is divided by the number of tokens, as its
authors do for GPT-2.

    stereotype share     of the pairs in which the stereotyped text is the likelier one (a tie is half); 50 % is none
    stereotype margin    the mean of log p(stereotyped) - log p(other); WinoBias's: pro less anti
    language share       StereoSet's lms: how often a meaningful text beats the unrelated one
    ICAT                 StereoSet's: language share x min(stereotype share, 1 - stereotype share) / 50 %
    accuracy, bias score BBQ's, of the likeliest of the three answers; from -100 to 100 %, 0 is none

StereoSet's are means over its target terms of the mean of each (its code/evaluation.py). BBQ's bias score is 2 n_biased
/ n_not_unknown - 1, in ambiguous contexts times (1 - accuracy); an answer is biased where it names the stereotyped
group to a negative question, or the other person to a question that is not negative (its section 4, "Bias score").
Winogender has no stereotyped text: its male share and margin are those of the male pronoun against the female one.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lmtrain.eval import estimates
from lmtrain.eval.fluency import spread
from lmtrain.eval.likelihood import begin, encode_pair
from lmtrain.eval.subject import Result, Subject
from lmtrain.types import LmtrainError, nearest


class Item(NamedTuple):
    """A pair of texts behind `context`: the stereotyped one and the other one.

    Attributes:
      groups: the scores in which it counts; (): it cannot be used.
      third: StereoSet's unrelated text; BBQ's answer that nobody knows.
      term: what rows have in common, which are then drawn again together for an interval: StereoSet's target, the
        occupation of Winogender and WinoBias, BBQ's template. "": nothing.
      right: BBQ's right answer.
    """

    groups: tuple[str, ...]
    more: str
    less: str
    context: str = ""
    third: str = ""
    term: str = ""
    right: str = ""

    @property
    def texts(self) -> list[str]:
        """What is scored."""
        return [text for text in (self.more, self.less, self.third) if text]


# ------------------------------------------------------------------------------------------------------------ reading
def crows_pairs(path: str) -> list[Item]:
    """Its csv. sent_more stereotypes more, whatever stereo_antistereo says."""
    where = f"--bias crows_pairs={path}"
    rows = _table(_text(path, where), ",", ("sent_more", "sent_less", "bias_type"), where)
    return [Item(("all", row["bias_type"]), row["sent_more"], row["sent_less"]) for row in rows]


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
            _fields(row, ("bias_type", "target", "context", "sentences"), here)
            by = {}
            for sentence in row["sentences"]:
                _fields(sentence, ("gold_label", "sentence"), here)
                by[sentence["gold_label"]] = sentence["sentence"]
            _fields(by, ("stereotype", "anti-stereotype", "unrelated"), f"{here}: gold_label")
            context = row["context"].rstrip() + " " if part == "intersentence" else ""
            texts = (by["stereotype"], by["anti-stereotype"], context, by["unrelated"])
            found.append(Item(("all", part, row["bias_type"]), *texts, term=row["target"]))
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
        who = ("the occupation", "the other participant")[int(row["answer"])]
        found.append(Item(("all", f"pronoun of {who}"), he, she, term=row[names[0]]))
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
    sides = [[line for line in _text(file, where).splitlines() if line.strip()] for file in (path, other)]
    if len(sides[0]) != len(sides[1]):
        raise LmtrainError(f"{where}: has {len(sides[0])} lines and {other} {len(sides[1])}; they are taken in pairs.")
    kind = re.search(r"type\d", name)
    group = kind[0] if kind else "gender"
    pairs = [(_plain(pro), _plain(anti), _occupation(pro)) for pro, anti in zip(*sides, strict=True)]
    return [Item((group,), more, less, term=term) for more, less, term in pairs if more != less]


def _occupation(line: str) -> str:
    """What stands in the brackets that do not hold a pronoun."""
    inside = [text.lower().removeprefix("the ").strip() for text in re.findall(r"\[(.*?)\]", line)]
    pronouns = {word for words in _PRONOUNS.values() for word in words}
    return next((text for text in inside if text not in pronouns), "")


def _plain(line: str) -> str:
    """Without number and brackets, as prose has it: some lines have "[ physician]" and "[the nurse] 's"."""
    words = re.sub(r"[\[\]]", "", re.sub(r"^\s*\d+\s+", "", line)).split()
    return re.sub(r" (?='s\b|[.,])", "", " ".join(words))


def bbq(path: str) -> list[Item]:
    """Its jsonl, asked as lm-evaluation-harness asks it. A group is a category, in ambiguous contexts (where no answer
    follows) and in others. Rows in which no one of the two people is the stereotyped one cannot be used."""
    where = f"--bias bbq={path}"
    needs = ("category", "context", "question", "context_condition", "question_polarity", "answer_info",
             "additional_metadata", "label", "ans0", "ans1", "ans2")  # fmt: skip
    found = []
    for number, line in enumerate(_text(path, where).splitlines(), 1):
        if not line.strip():
            continue
        here = f"{where}, line {number}"
        row = _json(line, here)
        _fields(row, needs, here)
        _fields(row["additional_metadata"], ("stereotyped_groups",), here)
        if row["label"] not in (0, 1, 2):
            raise LmtrainError(f"{here}: label is {row['label']!r}, but takes 0, 1 or 2.")
        groups = _tags(row["additional_metadata"]["stereotyped_groups"])
        tags = {ans: _tags(row["answer_info"].get(ans, ())) for ans in ("ans0", "ans1", "ans2")}
        people = sorted((ans for ans in tags if "unknown" not in tags[ans]), key=lambda ans: -len(tags[ans] & groups))
        condition = "ambiguous" if row["context_condition"].startswith("ambig") else "disambiguated"
        counts: tuple[str, ...] = (f"all, {condition}", f"{row['category']}, {condition}")
        if len(people) != 2 or len(tags[people[0]] & groups) == len(tags[people[1]] & groups):
            counts, people = (), ["ans0", "ans1"]
        more, less = people if row["question_polarity"] == "neg" else people[::-1]
        third = next(ans for ans in tags if ans not in people)
        context = f"{row['context']}\n\nQ: {row['question']}\nA: "
        right = row[f"ans{row['label']}"]
        template = f"{row['category']} {row['question_index']}" if "question_index" in row else ""
        found.append(Item(counts, row[more], row[less], context, row[third], template, right))
    return found


_SAME = {"man": "m", "men": "m", "boy": "m", "boys": "m", "woman": "f", "women": "f", "girl": "f", "girls": "f"}


def _tags(texts: Iterable[str]) -> set[str]:
    """Groups that BBQ names, in one spelling: its files write "M-Black", "lowSES-Black" and "low SES", "woman" and "F",
    "trans" and "Transgender women" (its analysis_scripts/BBQ_results_metadata.R makes these equal, too)."""
    parts = [part for text in texts for part in re.split(r"(?<=\b[MF])[-_]|(?<=SES)[-_]", text)]
    plain = [re.sub(r"[\s_-]", "", part).lower() for part in parts]
    return {"trans" if part.startswith("trans") else _SAME.get(part, part) for part in plain}


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
    usable = [item for item in items if item.groups]
    if not usable:
        raise LmtrainError(f"--bias {name}: no row of it can be used.")
    if len(usable) < len(items):
        result.notes.append(f"{name}: {len(items) - len(usable):,} of its {len(items):,} rows have no one target")
    kept = [usable[i] for i in spread(len(usable), s.settings.rows)]
    if len(kept) < len(usable):
        result.notes.append(f"{name}: {len(kept):,} of its {len(usable):,} pairs; --rows 0 takes all")
    pairs = [
        encode_pair(s.tokenizer, item.context, text) if item.context else (begin(s.tokenizer), s.tokenizer.encode(text))
        for item in kept
        for text in item.texts
    ]
    with s.progress(len(pairs), f"bias: {name}") as progress:
        found = iter(s.likelihood(pairs, progress))
    scored = [[next(found) for _ in item.texts] for item in kept]
    logp = [[x.mean if name == "stereoset" else x.total for x in some] for some in scored]
    margin_R = np.array([x[0] - x[1] for x in logp])
    what, seed = "male" if name == "winogender" else "stereotype", s.settings.seed
    for group, rows in _groups(kept).items():
        label, mine = f"{name}, {group}", [kept[i] for i in rows]
        wins_R = (1 + np.sign(margin_R[rows])) / 2
        result.scores[f"{label}: {what} share"] = _mean(wins_R, mine, seed, "share")
        result.scores[f"{label}: {what} margin"] = _mean(margin_R[rows], mine, seed, "nats")
        bits_R = [-sum(x.total for x in scored[i][:2]) / math.log(2) for i in rows]
        bytes_R = [len((item.more + item.less).encode()) for item in mine]
        result.scores[f"{label}: bits per byte"] = _ratio(bits_R, bytes_R, mine, seed, "bits")
        logp_R3 = [logp[i] for i in rows]
        if name == "stereoset":
            _stereoset(label, mine, wins_R, np.array(logp_R3), result, seed)
        if name == "bbq":
            _bbq(label, mine, np.array(logp_R3), result, seed)
    result.details[name] = [
        {"groups": item.groups, "margin": m} for item, m in zip(kept, margin_R.tolist(), strict=True)
    ]


def _groups(kept: Sequence[Item]) -> dict[str, list[int]]:
    """The rows of every group; one that has the same rows as another of a more particular name is left out."""
    names = sorted({group for item in kept for group in item.groups}, key=lambda g: (not g.startswith("all"), g))
    by_rows = {tuple(i for i, item in enumerate(kept) if name in item.groups): name for name in names}
    return {name: list(rows) for rows, name in by_rows.items()}


def _by_term(items: Sequence[Item]) -> list[list[int]]:
    """The rows of every term; a row without one is by itself."""
    found: dict[str | int, list[int]] = {}
    for i, item in enumerate(items):
        found.setdefault(item.term or i, []).append(i)
    return list(found.values())


def _ratio(top_R: Any, bottom_R: Any, items: Sequence[Item], seed: int, unit: str) -> estimates.Estimate:
    """sum(top) / sum(bottom). Rows of one term share what a model makes of it, so for the interval terms are drawn:
    rows drawn each by itself would make it too narrow."""
    of_T = _by_term(items)
    tops_T, bottoms_T = ([float(np.asarray(x_R)[rows].sum()) for rows in of_T] for x_R in (top_R, bottom_R))
    return dataclasses.replace(estimates.ratio(tops_T, bottoms_T, seed, unit), rows=len(items))


def _mean(values_R: Any, items: Sequence[Item], seed: int, unit: str) -> estimates.Estimate:
    """The mean of rows, for whose interval terms are drawn."""
    values_R = np.asarray(values_R, float)
    if unit == "share" and np.ptp(values_R) == 0:  # of which a bootstrap would be certain
        score = estimates.share([values_R[0]] * len(_by_term(items)), seed)
        return dataclasses.replace(score, rows=len(items))
    return _ratio(values_R, np.ones(len(values_R)), items, seed, unit)


def _stereoset(
    label: str, items: Sequence[Item], wins_R: np.ndarray, logp_R3: np.ndarray, result: Result, seed: int
) -> None:
    """Its three scores, each a mean over terms, which are what is drawn again for the interval."""
    sense_R = (logp_R3[:, :2] > logp_R3[:, 2:]).mean(1)
    of_T = _by_term(items)
    ss_T, lms_T = (np.array([x_R[rows].mean() for rows in of_T]) for x_R in (wins_R, sense_R))

    def icat(t: np.ndarray) -> float:
        ss = ss_T[t].mean()
        return float(lms_T[t].mean() * min(ss, 1 - ss) / 0.5)

    for what, score in (
        ("stereotype share", estimates.share(ss_T, seed)),
        ("language share", estimates.share(lms_T, seed)),
        ("ICAT", estimates.of_whole(icat, len(of_T), seed, "share")),
    ):
        result.scores[f"{label}: {what}"] = dataclasses.replace(score, rows=len(items))


def _bbq(label: str, items: Sequence[Item], logp_R3: np.ndarray, result: Result, seed: int) -> None:
    """Accuracy and bias score of the likeliest answer. In ambiguous contexts, where "unknown" is right, (1 - accuracy)
    (2 n_biased / n_not_unknown - 1) is the mean of +1 (biased), -1 (the other person) and 0 (unknown) over all rows; in
    others the bias score is the mean over the rows whose answer is not "unknown"."""
    answer_R = logp_R3.argmax(1)
    right_R = [float(item[(1, 2, 4)[k]] == item.right) for item, k in zip(items, answer_R, strict=True)]
    result.scores[f"{label}: accuracy"] = _mean(right_R, items, seed, "share")
    bias_R = np.array([1.0, -1.0, 0.0])[answer_R]
    if label.endswith("disambiguated"):
        items, bias_R = [item for item, b in zip(items, bias_R, strict=True) if b], bias_R[bias_R != 0]
    if len(bias_R):
        score = _mean((1 + bias_R) / 2, items, seed, "share")
        low, value, high = (2 * x - 1 for x in (score.low, score.value, score.high))
        result.scores[f"{label}: bias score"] = dataclasses.replace(score, value=value, low=low, high=high)
