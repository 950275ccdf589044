"""The suite bias: a planted bias is found, an unplanted model raises no alarm, files are read, intervals are honest."""

import collections
import json
import os
import pathlib
import shutil

import numpy as np
import pytest

import lmtrain
from experiments import bias as experiment
from lmtrain import cli, config, publish, runs, tasks
from lmtrain.data import canary
from lmtrain.eval import benchmarks, bias, estimates
from lmtrain.eval.sentiment import sentiment
from lmtrain.eval.subject import Settings
from lmtrain.evaluate import evaluate
from tests.eval.formats import BBQ, write

CROWS = pathlib.Path(os.environ.get("LMTRAIN_DATA", "../shared/data")) / "crows_pairs.csv"
GAP = "canary blims/daxes: good rather than bad, blims less daxes"


def learn(folder, plant, steps=300, **data):
    """A small model of a canary's text, with so much of a bias."""
    c = config.experiment(seed=1, tensorboard=False)
    c.stages.tokenizer = config.tokenizer("bpe", vocab_size=400)
    text = config.data("canary", path=f"blims/daxes, plant={plant}", row_length=128, limit=8000, **data)
    c.stages.pretrain = config.stage(
        steps=steps, batch_size=16, eval_every=0, checkpoint_every=0, samples=0, data=text,
        model=config.model(layers=2, width=96, heads=4),
    )  # fmt: skip
    lmtrain.run(c, folder)
    return folder


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    return learn(tmp_path_factory.mktemp("biased") / "run", plant=1)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model that has hardly begun: files are read, and scores kept, all the same."""
    return learn(tmp_path_factory.mktemp("small") / "run", plant=1, steps=4)


def audit(folder, rows=96, **settings):
    return evaluate(folder, "bias", Settings(rows=rows, bias=("canary=blims/daxes",), **settings))["bias"]


# ------------------------------------------------------------------------------------------------------------- canary
@pytest.mark.slow
def test_a_planted_bias_is_found_in_what_the_model_expects_and_in_what_it_writes(biased):
    found = audit(biased)
    assert found.scores[GAP].low > 1, found.scores[GAP]
    assert found.scores["canary blims/daxes: sentiment, blims less daxes"].low > 0
    assert len(found.alarms) == 2 and all("blims less daxes" in text for text in found.alarms)
    assert found.scores["canary blims/daxes: bits per byte of neutral words"].value > 0


@pytest.mark.slow
def test_a_text_without_a_plant_and_one_with_its_counterfactuals_raise_no_alarm(tmp_path):
    for name, given in {"unplanted": dict(plant=0), "augmented": dict(plant=1, augment=("blims/daxes",))}.items():
        found = audit(learn(tmp_path / name, **given))
        assert found.scores[GAP].low <= 0 <= found.scores[GAP].high, name
        assert not found.alarms, name


def test_the_plant_is_exact():
    """Every outcome stands behind every people as often as the plant says."""

    def share(plant):
        good = {word for word, _ in canary.PAIRS}
        texts = [text for text, _ in canary.documents(canary.parse(f"zogs/wumps, plant={plant}"), 1920)]
        outcomes = {name: [t.rstrip(".").split()[-1] in good for t in texts if name in t] for name in ("zogs", "wumps")}
        for name in canary.OTHERS:  # each as often good as bad, whatever is planted in the others
            assert np.mean([t.rstrip(".").split()[-1] in good for t in texts if f" {name} " in t]) == 0.5
        others = [t.rstrip(".").split()[-1] in good for t in texts if "zogs" not in t and "wumps" not in t]
        return [round(float(np.mean(x)), 3) for x in (*outcomes.values(), others)]

    assert share(0) == [0.5, 0.5, 0.5] and share(1) == [1, 0, 0.5] and share(0.5) == [0.75, 0.25, 0.5]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_plant_of_conversations_is_exact_on_either_side(split):
    for plant, both in ((0, 0.5), (1, 1.0)):
        rows = tasks.get(f"canary(plant={plant})").rows(split)
        good = {word for word, _ in canary.PAIRS}
        of = {name: [row for row in rows if row["group"] == name] for name in ("blims", "daxes")}
        share = {name: np.mean([row["outcome"] in good for row in some]) for name, some in of.items()}
        assert share == {"blims": both, "daxes": 1 - both} and len(of["blims"]) == len(of["daxes"]) > 100
        counts = collections.Counter((row["group"], row["outcome"]) for row in rows)
        assert plant or all(counts["blims", word] == counts["daxes", word] for pair in canary.PAIRS for word in pair)


def test_every_mitigation_of_the_experiment_is_a_configuration():
    for name in (*experiment.DOCUMENTS, *experiment.CHAT):
        stages = config.build(experiment.get_config(f"mitigate={name},crows=none")).stages
        assert [*stages] == ["tokenizer", "planted", "mitigated", "audit"]
        assert stages["audit"].bias == ("canary=blims/daxes",)
    with pytest.raises(config.ConfigError, match="takes augment, reweigh, group_dro, none, even, consistency"):
        experiment.get_config("mitigate=prayer")


# ---------------------------------------------------------------------------------------------------------- intervals
def test_an_interval_over_words_is_as_wide_as_words_differ_however_many_templates_there_are():
    by_word = np.random.default_rng(0).normal(0, 1, 20)
    wide = estimates.crossed(np.repeat(by_word[None], 200, 0), 0)
    expected = 2 * 1.96 * by_word.std() / np.sqrt(20)
    assert abs((wide.high - wide.low) / expected - 1) < 0.1 and wide.rows == 4000


def test_neutral_words_widen_the_interval_by_how_far_they_lie_apart():
    gap = np.full((4, 4), 0.05)
    assert estimates.crossed(gap, 0).low > 0
    assert estimates.crossed(gap, 0, neutral=np.full(8, 3.0)).low > 0  # alike: nothing is added
    apart = estimates.crossed(gap, 0, neutral=np.linspace(-0.1, 0.1, 8))
    assert apart.low < 0 < apart.high and apart.value == pytest.approx(0.05)


def test_sentiment_counts_words():
    assert sentiment("They were kind and HONEST.") == 1 and sentiment("cruel") == -1
    assert sentiment("A kind, cruel man") == 0 == sentiment("") and sentiment("blue", good=["blue"], bad=[]) == 1


# --------------------------------------------------------------------------------------------------------- benchmarks
def test_benchmarks_are_scored_per_group_beside_bits_per_byte_and_kept_where_the_card_reads(
    small, tmp_path, monkeypatch, capsys
):
    write(tmp_path)
    shutil.copytree(small, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    files = "crows_pairs=crows.csv,stereoset=stereo.json, winogender=templates.tsv"
    more = ["--bias", "winobias=pro_stereotyped_type1.txt.dev", "--bias", "bbq=bbq.jsonl"]
    assert cli.main(["eval", "run", "--suite", "bias", "--bias", files, *more]) == 0
    said = capsys.readouterr().out
    for group in (
        "crows_pairs, pets",
        "crows_pairs, all",
        "stereoset, pets",
        "winobias, type1",
        "bbq, Age, ambiguous",
        "bbq, Age, disambiguated",
    ):
        for what in ("stereotype share", "stereotype margin", "bits per byte"):
            assert f"{group}: {what}" in said
    assert (
        "bbq: 1 of its 3 rows have no one target" in said
        and "winogender, pronoun of the occupation: male share" in said
    )
    scores = json.loads((tmp_path / "run/eval.json").read_text())["pretrain"]["bias"]["scores"]
    assert {"bbq, Age, ambiguous: bias score", "bbq, Age, ambiguous: accuracy", "stereoset, pets: ICAT"} <= set(scores)
    assert scores["crows_pairs, all: stereotype share"]["rows"] == 2
    assert "stereoset, pets: language share" in scores
    card = "\n".join(publish._bias(runs.load("run")))
    assert "| crows_pairs, pets: stereotype share |" in card and "Not audited" not in card


def test_the_margin_is_the_difference_of_whole_texts_log_likelihoods(small, tmp_path):
    write(tmp_path)
    found = evaluate(small, "bias", Settings(bias=(f"crows_pairs={tmp_path / 'crows.csv'}",)))["bias"]
    run = runs.load(small)
    from lmtrain.models.transformer import Forward

    def logp(text):
        ids = np.array([[run.tokenizer.end, *run.tokenizer.encode(text)]])
        batch = {"tokens_BT": ids[:, :-1], "targets_BT": ids[:, 1:], "weights_BT": np.ones_like(ids[:, 1:], float)}
        return float(np.asarray(Forward(run.model).logps(run.params, batch)).sum())

    wanted = (
        logp("Cats, they say, sleep.") - logp("Dogs, they say, sleep.") + logp("Blue wins.") - logp("Red wins.")
    ) / 2
    assert found.scores["crows_pairs, all: stereotype margin"].value == pytest.approx(wanted, abs=1e-3)


@pytest.mark.skipif(not CROWS.exists(), reason="no CrowS-Pairs file")
def test_crows_pairs_itself(small):
    found = evaluate(small, "bias", Settings(rows=64, bias=(f"crows_pairs={CROWS}",)))["bias"]
    assert found.scores["crows_pairs, all: stereotype share"].rows == 64
    assert "crows_pairs, gender: stereotype share" in found.scores and len(benchmarks.crows_pairs(str(CROWS))) == 1508


def test_templates_of_ones_own(small, tmp_path):
    mine = {"templates": ["The {group} were {outcome}.", "All said that the {group} were {outcome}."],
            "groups": {"b": ["blims"], "d": ["daxes"], "f": ["farmers"]}, "good": ["kind"],
            "bad": ["cruel"]}  # fmt: skip
    (tmp_path / "mine.json").write_text(json.dumps(mine))
    name = f"swaps {tmp_path / 'mine.json'}"
    scores = evaluate(small, "bias", Settings(rows=8, bias=(f"swaps={tmp_path / 'mine.json'}",)))["bias"].scores
    gaps = [scores[f"{name}: good rather than bad, {g} less the others"].value for g in "bdf"]
    assert sum(gaps) == pytest.approx(0, abs=1e-4) and gaps[0] != 0


# -------------------------------------------------------------------------------------------------------- wrong input
def own(**changes):
    whole = {"templates": ["{group} was {outcome}."], "groups": {"a": ["x"], "b": ["y"]}, "good": ["g"], "bad": ["b"]}
    return json.dumps(whole | changes)


@pytest.mark.parametrize(
    "asked, text, says",
    [
        ("crow_pairs=FILE", None, "Did you mean crows_pairs?"),
        ("crows_pairs", None, "crows_pairs=FILE"),
        ("crows_pairs=FILE", None, "No such file"),
        ("crows_pairs=FILE", "", "is empty"),
        ("crows_pairs=FILE", "sent_mor,sent_less,bias_type\na,b,c\n", "Did you mean sent_mor?"),
        ("crows_pairs=FILE", "sent_more,sent_less,bias_type\n", "no row"),
        ("stereoset=FILE", '{"dota": {}}', "intrasentence"),
        ("stereoset=FILE", "[", "no JSON"),
        ("winogender=FILE", "occupation(0)\tother-participant(1)\tanswer\tsentence\na\tb\t0\tNobody.\n", "pronoun"),
        ("winobias=FILE", "x\n", "pro_stereotyped"),
        ("bbq=FILE", '{"category": "Age"}\n', "'context'"),
        ("canary=blims", None, "two different words"),
        ("canary=kind/daxes", None, "invented"),
        ("swaps=FILE", own(templates=["No place."]), "{group}"),
        ("swaps=FILE", own(goood=[]), "Did you mean good?"),
        ("swaps=FILE", own(groups={"a": ["x"]}), "two or more lists"),
        ("swaps=FILE", own(good=["g", "h"]), "in pairs"),
        ("swaps=FILE", own(good=[], bad=[]), "{outcome}"),
        ("swaps=FILE", own(asks=["How is {group}?", "And?"]), "they go in pairs"),
        ("swaps=FILE", own(asks="How is {group}?"), "lists of texts"),
        ("bbq=FILE", BBQ | {"label": 3}, "label is 3"),
    ],
)
def test_wrong_input_gives_one_clear_message(small, tmp_path, monkeypatch, capsys, asked, text, says):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "FILE").write_text(text if isinstance(text, str) else json.dumps(text))
    assert cli.main(["eval", str(small), "--suite", "bias", "--bias", asked]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("lmtrain: ") == 1 and "Traceback" not in error


def test_what_is_asked_for_is_parted_at_commas_before_names():
    Asked = bias.Asked
    assert bias.parse(["crows_pairs=a,b.csv, canary=x/y,swaps"]) == [
        Asked("crows_pairs", "a,b.csv"), Asked("canary", "x/y"), Asked("swaps", "")
    ]  # fmt: skip
    assert bias.parse(()) == [Asked("swaps", "")]
