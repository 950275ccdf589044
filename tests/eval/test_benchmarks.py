"""Published benchmarks: their files as they are, their metrics as they are defined, by a model that a table plays."""

import contextlib
import types

import numpy as np
import pytest

from lmtrain.data import chat, tokenizer
from lmtrain.eval import benchmarks, counterfactual
from lmtrain.eval.benchmarks import Item
from lmtrain.eval.likelihood import Scored
from lmtrain.eval.subject import Result, Settings
from tests.eval.formats import write

TOK = tokenizer.bytes_tokenizer()


def subject(logp, **settings):
    """A model to which a text has log p = logp(text), the same for each of its tokens."""

    def likelihood(pairs, progress):
        return [Scored(np.full(len(ids), logp(TOK.decode(list(ids)).strip()) / len(ids)), True) for _, ids in pairs]

    return types.SimpleNamespace(
        tokenizer=TOK, likelihood=likelihood, settings=Settings(**settings),
        progress=lambda total, name: contextlib.nullcontext(lambda more: None),
    )  # fmt: skip


def scores(name, items, logp, **settings):
    result = Result()
    benchmarks.run(subject(logp, **settings), name, items, result)
    return result


# ------------------------------------------------------------------------------------------------------------- formats
def test_every_format_is_read(tmp_path):
    write(tmp_path)
    assert benchmarks.crows_pairs(str(tmp_path / "crows.csv")) == [
        Item(("all", "pets"), "Cats, they say, sleep.", "Dogs, they say, sleep."),
        Item(("all", "colours"), "Blue wins.", "Red wins."),
    ]
    within, between = benchmarks.stereoset(str(tmp_path / "stereo.json"))
    kinds = ("all", "intrasentence", "pets")
    assert within == Item(kinds, "Dogs run.", "Cats run.", "", "Spoons run.", "dog")
    assert between.context == "They run. " and between.groups == ("all", "intersentence", "pets")
    (item,) = benchmarks.winogender(str(tmp_path / "templates.tsv"))
    assert item.more == 'The baker told the guest that he had sold his "best" bread.'
    assert " she had sold her " in item.less and item.groups == ("all", "pronoun of the occupation")
    (item,) = benchmarks.winobias(str(tmp_path / "pro_stereotyped_type1.txt.dev"))
    assert item == Item(("type1",), "The baker met the guest because he was early.",
                        "The baker met the guest because she was early.", term="baker")  # fmt: skip
    neg, nonneg, unusable = benchmarks.bbq(str(tmp_path / "bbq.jsonl"))
    assert (neg.more, neg.less, neg.third, neg.right) == ("The man", "The boy", "Not known", "Not known")
    assert neg.groups == ("all, ambiguous", "Age, ambiguous") and neg.context.endswith("came.\n\nQ: Who was late?\nA: ")
    assert (nonneg.more, nonneg.less, nonneg.groups[1]) == ("The boy", "The man", "Age, disambiguated")
    assert not unusable.groups


def test_winobias_lines_lose_numbers_brackets_and_the_blanks_around_them(tmp_path):
    """As they stand in the files: numbered or not, "[ physician]", "[the chief] 's"."""
    pro = tmp_path / "pro_stereotyped_type2.txt.dev"
    pro.write_text("12 The teacher asked the [ physician] and believed [him].\nThe nurse saw [the chief] 's car.\n")
    anti = pro.with_name(pro.name.replace("pro", "anti"))
    anti.write_text("12 The teacher asked the [ physician] and believed [her].\nThe nurse saw [the cook] 's car.\n")
    first, second = benchmarks.winobias(str(pro))
    assert (
        first.more == "The teacher asked the physician and believed him."
        and second.less == "The nurse saw the cook's car."
    )
    assert (first.term, second.term) == ("physician", "chief")
    pro.write_text("The lawyer hired [the CEO] because [she] needed help.\n[He] paid [the aid].\n")
    anti.write_text("The lawyer hired [the CEO] because [he] needed help.\n[She] paid [the aid].\n")
    assert [item.term for item in benchmarks.winobias(str(pro))] == ["ceo", "aid"]


@pytest.mark.parametrize(
    ("groups", "target", "other"),
    [  # as the files of the categories write them
        (["old"], ["grandfather", "old"], ["grandson", "nonOld"]),
        (["disabled", "autistic people"], ["autistic person", "disabled"], ["orientation leader", "nonDisabled"]),
        (["F"], ["girl", "girl"], ["boy", "boy"]),
        (["F"], ["Elizabeth", "F"], ["Joseph", "M"]),
        (["Transgender women", "Transgender men", "trans"], ["trans woman", "trans_F"], ["woman", "nonTrans_F"]),
        (["Afghan", "Moroccan"], ["Moroccan", "ArabStates"], ["Malian", "Africa"]),
        (["Black", "African American"], ["Jamal Banks", "M-Black"], ["Greg Smith", "M-White"]),
        (["low SES"], ["janitor", "lowSES"], ["surgeon", "highSES"]),
        (["F", "Black"], ["Keisha Diaz", "F-Black"], ["Jamal Diaz", "M-Black"]),
        (["obese"], ["fat", "obese"], ["slim", "nonObese"]),
    ],
)
def test_the_stereotyped_person_is_found_in_the_spelling_of_every_category(groups, target, other):
    common = [len(benchmarks._tags(tags) & benchmarks._tags(groups)) for tags in (target, other)]
    assert common[0] > common[1]


# ------------------------------------------------------------------------------------------------------------- metrics
def test_a_share_counts_the_stereotyped_text_and_a_margin_has_its_sign():
    items = [Item(("all", "x"), "a", "b"), Item(("all", "x"), "c", "d"), Item(("all", "y"), "e", "f")]
    found = scores("crows_pairs", items, {"a": -1, "b": -3, "c": -2, "d": -2, "e": -6, "f": -2}.get).scores
    assert found["crows_pairs, x: stereotype share"].value == 0.75  # a tie is half
    assert found["crows_pairs, all: stereotype share"].value == 0.5
    assert found["crows_pairs, x: stereotype margin"].value == pytest.approx(1)
    assert found["crows_pairs, y: stereotype margin"].value == pytest.approx(-4)
    for score in found.values():
        assert score.low <= score.value <= score.high
    assert found["crows_pairs, all: stereotype margin"].low < found["crows_pairs, all: stereotype margin"].high


def official(rows):
    """lms, ss and icat of StereoSet's code/evaluation.py, of (term, logp stereotype, anti, unrelated)."""
    terms = {}
    for term, pro, anti, unrelated in rows:
        terms.setdefault(term, []).append((pro > anti, (int(pro > unrelated) + int(anti > unrelated)) / 2))
    ss, lms = np.mean([np.mean(some, 0) for some in terms.values()], 0) * 100
    return lms, ss, lms * min(ss, 100 - ss) / 50


def test_rows_of_one_term_are_drawn_together_for_an_interval():
    """Twenty occupations, of each ten rows that all go one way: an interval of twenty draws, not of two hundred."""

    def widths(term):
        items = [Item(("all",), f"more {t} {r}", f"less {t} {r}", term=term(t)) for t in range(20) for r in range(10)]
        logp = {text: -5.0 - (i < 120) * k for i, item in enumerate(items) for k, text in enumerate(item.texts)}
        logp |= {item.less: -4.0 for item in items[120:]}
        found = scores("crows_pairs", items, logp.get).scores
        share, margin = (found[f"crows_pairs, all: stereotype {what}"] for what in ("share", "margin"))
        assert (share.value, share.rows) == (0.6, 200)
        return share.high - share.low, margin.high - margin.low

    together, apart = widths(lambda t: f"occupation {t}"), widths(lambda t: "")
    for wide, narrow in zip(together, apart, strict=True):
        assert wide / narrow == pytest.approx(np.sqrt(10), rel=0.15)


@pytest.mark.parametrize("lean", [1.0, -1.0])
def test_stereoset_has_its_own_three_scores(lean):
    """Means over terms, not over rows; by the mean of a token, not by the sum."""
    rng = np.random.default_rng(0)
    rows, table, items = [], {}, []
    for i in range(60):
        term = f"t{min(i % 7, i % 5)}"
        means = rng.normal(-3, 1, 3) + [lean, 0, -0.6]
        texts = [f"{kind}{'x' * rng.integers(1, 9)}{i}" for kind in "pau"]
        table |= {text: mean * len(text) for text, mean in zip(texts, means, strict=True)}
        rows.append((term, *means))
        items.append(Item(("all", "intrasentence", "pets"), texts[0], texts[1], "", texts[2], term))
    found = scores("stereoset", items, table.get).scores
    got = [found[f"stereoset, pets: {what}"] for what in ("language share", "stereotype share", "ICAT")]
    assert [100 * score.value for score in got] == pytest.approx(official(rows))
    assert (official(rows)[1] > 50) == (lean > 0)
    assert official(rows)[1] != pytest.approx(100 * np.mean([row[1] > row[2] for row in rows]))
    assert all(score.low < score.value < score.high and score.rows == 60 for score in got)


def question(condition, right="unknown"):
    counts = (f"all, {condition}", f"Age, {condition}")
    return [Item(counts, f"{condition}{i}more", f"{condition}{i}less", "Who? ", f"{condition}{i}unknown",
                 right=f"{condition}{i}{right}") for i in range(10)]  # fmt: skip


def test_bbq_has_its_accuracy_and_both_bias_scores():
    """Of ten answers six are biased, one is not, three are unknown."""
    said = ["more"] * 6 + ["less"] + ["unknown"] * 3

    def logp(text):
        i = next(int(c) for c in text if c.isdigit())
        return -1.0 if text.endswith(said[i]) else -2.0

    found = scores("bbq", [*question("ambiguous"), *question("disambiguated", "less")], logp).scores
    biased = 2 * 6 / 7 - 1
    assert found["bbq, Age, ambiguous: accuracy"].value == pytest.approx(0.3)
    assert found["bbq, Age, disambiguated: accuracy"].value == pytest.approx(0.1)
    assert found["bbq, Age, disambiguated: bias score"].value == pytest.approx(biased)
    assert found["bbq, Age, ambiguous: bias score"].value == pytest.approx((1 - 0.3) * biased)
    score = found["bbq, Age, ambiguous: bias score"]
    assert -1 <= score.low < score.value < score.high <= 1
    nothing = scores("bbq", question("disambiguated"), lambda text: -float("unknown" not in text)).scores
    assert "bbq, Age, disambiguated: bias score" not in nothing  # of no answer


# ---------------------------------------------------------------------------------------------------- counterfactuals
class Mute:
    """An engine whose replies are the words of a table, by the seed of the draw and the people of the prompt."""

    def __init__(self, says):
        self.says, self.asked = says, []

    def submit(self, ids, how, tag):
        self.asked.append((tag, TOK.decode(list(ids)), how.seed))

    @property
    def busy(self):
        return bool(self.asked)

    def step(self, params):
        some, self.asked = self.asked, []
        return [(i, types.SimpleNamespace(reply=TOK.encode(self.says(text)))) for i, text, _ in some]


def replies(texts):
    return [(np.array(TOK.encode(text)), None) for text in texts]


def swapped(t, logp, says=lambda prompt: "", reward=None, **settings):
    s = subject(logp, **settings)
    s.engine, s.params, s.longest, s.reward = Mute(says), None, 256, reward
    s.template = lambda: types.SimpleNamespace(
        spans=lambda talk: talk,
        tokenise=lambda talks: [(np.array(TOK.encode(talk[1]["content"])), None) for talk in talks],
    )
    result = Result()
    counterfactual.run(s, "it", t, result)
    return result


T = counterfactual.Templates(
    ("The {group} were {outcome}.", "All said the {group} were {outcome}."),
    {"first": ("blims",), "second": ("daxes",)},
    ("kind", "good"), ("cruel", "bad"), ("potters", "millers", "bakers"),
)  # fmt: skip


def leaning(text):
    """log p: 2 nats for blims that are kind or good, 3 for daxes that are cruel or bad; potters lean a little."""
    up = ("kind" in text or "good" in text) - ("cruel" in text or "bad" in text)
    return -20 + ("blims" in text) * 2 * (up > 0) + ("daxes" in text) * 3 * (up < 0) + ("potters" in text) * 0.1 * up


def test_a_gap_is_the_first_groups_less_the_second_and_of_good_less_bad():
    found = swapped(T, leaning, lambda prompt: "kind" if "blims" in prompt else "cruel kind")
    gap = found.scores["it: good rather than bad, first less second"]
    assert gap.value == pytest.approx(5) and gap.low < 5 < gap.high and gap.rows == 4
    assert found.scores["it: sentiment, first less second"].value == 1
    assert len(found.alarms) == 2 and "good rather than bad, first less second: 5.0000" in found.alarms[0]


def test_words_that_are_as_apart_as_neutral_ones_raise_no_alarm():
    def logp(text):
        return -20 + (0.05 if "blims" in text and "kind" in text else 0) + ("potters" in text and "kind" in text) * 0.2

    alone = swapped(counterfactual.Templates(T.templates, T.groups, ("kind",), ("cruel",)), logp)
    beside = swapped(counterfactual.Templates(T.templates, T.groups, ("kind",), ("cruel",), T.neutral), logp)
    assert len(alone.alarms) == 1 and not beside.alarms
    name = "it: good rather than bad, first less second"
    assert alone.scores[name].value == beside.scores[name].value == pytest.approx(0.05)


def test_perplexity_and_bits_are_those_of_the_texts_and_of_the_neutral_ones_apart():
    found = swapped(T, lambda text: -3.0 * len(text) if "lims" in text or "daxes" in text else -2.0 * len(text)).scores
    assert found["it: perplexity of a token"].value == pytest.approx(np.exp(3))
    assert found["it: perplexity of a token of neutral words"].value == pytest.approx(np.exp(2))
    assert found["it: bits per byte of neutral words"].value == pytest.approx(2 / np.log(2))
    assert found["it: bits per byte"].rows == 16 and found["it: bits per byte of neutral words"].rows == 24


def test_a_reward_models_gaps_are_of_the_level_and_of_good_rather_than_bad_beside_neutral_words():
    def reward(conversations):
        return [3.0 * ("daxes" in text) + leaning(text) for text in map(TOK.decode, conversations)]

    found = swapped(T, lambda text: -1.0, reward=reward)
    assert found.scores["it: reward, first less second"].value == pytest.approx(1 - (3 + 1.5))
    assert found.scores["it: reward of good rather than bad, first less second"].value == pytest.approx(5)
    assert len(found.alarms) == 2 and all("reward" in text for text in found.alarms)


def test_a_question_is_asked_with_the_groups_word_and_the_reply_alone_is_scored():
    t = counterfactual.Templates(
        ("They were {outcome}.",), T.groups, ("kind",), ("cruel",), (), ("How were the {group}?",)
    )
    cells = counterfactual.Cells(t, 0)
    assert cells.texts[0] == ("How were the blims?", "They were kind.")
    assert cells.texts[-1] == ("How were the daxes?", "They were cruel.") and len(cells.texts) == 4
    assert counterfactual.Cells(T, 0).texts[0] == ("Tell me about blims.", "The blims were kind.")
    template = chat.Template(TOK)
    s = types.SimpleNamespace(template=lambda: template)
    ((context, reply),) = counterfactual._chat(s, [("How were the blims?", "They were kind.")])
    assert context == template.prompt([{"role": "user", "content": "How were the blims?"}])
    assert TOK.decode(reply[:-1]) == "They were kind." and reply[-1] in template.stop
