"""A planted bias: found, mitigated, measured again. The canary of `lmtrain eval --suite bias`.

    lmtrain run --config experiments/bias.py --workdir runs/bias
    lmtrain run --config experiments/bias.py:plant=0 --workdir runs/unplanted
    lmtrain run --config experiments/bias.py:mitigate=reweigh,plant=0.5,first=zogs,second=wumps --workdir runs/zogs

Text about two invented peoples, of whom one is shown as good in 19 of 20 outcomes and the other as bad, teaches a small
model (0.27M parameters); a second stage goes on from it with the mitigation: `augment` (counterfactual data
augmentation, the default), `reweigh` (Kamiran & Calders), `group_dro` (Sagawa et al.), or `none` (the
planted text once more). With `even` (pairs made equally likely) and `consistency` (a reward in RL) the bias is planted
in conversations. Then both are audited and shown side by side. Perplexity is compared on text about other
peoples, which the plant does not touch: on text with the plant in it, a model without the bias must be worse.
CrowS-Pairs is reported too where `crows` is a file. 75 seconds on two cores, `even` and `consistency` several minutes;
docs/bias.md has the figures of each, and of several seeds.
"""

import pathlib

from lmtrain import config
from lmtrain.data.canary import PAIRS

DOCUMENTS, CHAT = ("augment", "reweigh", "group_dro", "none"), ("even", "consistency")


def get_config(arg=""):
    a = config.parse_arg(
        arg, mitigate="augment", plant=0.9, first="blims", second="daxes", steps=400, more=300, rl=100, seed=0,
        crows="../shared/data/crows_pairs.csv",
    )  # fmt: skip
    if a.mitigate not in DOCUMENTS + CHAT:
        raise config.ConfigError(f"mitigate is {a.mitigate!r}, but takes {', '.join(DOCUMENTS + CHAT)}.")
    people = f"{a.first}/{a.second}"
    like = dict(batch_size=16, eval_every=100, checkpoint_every=1000, samples=1)
    c = config.experiment(seed=a.seed)
    c.stages.tokenizer = config.tokenizer("bpe", vocab_size=512)
    planted, mitigated = (documents if a.mitigate in DOCUMENTS else conversations)(a, people)
    c.stages.planted = config.stage(**like, steps=a.steps, model=config.model(layers=2, width=96, heads=4), **planted)
    c.stages.mitigated = config.stage(**like | dict(steps=a.more) | mitigated)
    crows = (f"crows_pairs={a.crows}",) if pathlib.Path(a.crows).exists() else ()
    c.stages.audit = config.evaluation(suites=("bias",), bias=(f"canary={people}", *crows), rows=0)
    return c


def documents(a, people):
    """What the two stages learn from where the bias is planted in documents."""
    text = dict(path=f"{people}, plant={a.plant}, seed={a.seed}", row_length=128, limit=8000, heldout_rows=64)
    labels = dict(groups=(a.first, a.second), outcomes=tuple("/".join(words) for words in zip(*PAIRS, strict=True)))
    how = {
        "augment": dict(data=config.data("canary", **text, augment=(people,))),
        "reweigh": dict(data=config.data("canary", **text, **labels, reweigh=True)),
        "group_dro": dict(data=config.data("canary", **text, **labels), objective="group_dro"),
        "none": dict(data=config.data("canary", **text)),
    }
    return dict(data=config.data("canary", **text)), how[a.mitigate]


def conversations(a, people):
    """The same where it is planted in conversations."""
    task = f"canary(people={people!r}, plant={a.plant}, seed={a.seed}, others={{}})"

    def rows(path, **more):
        return config.data("task", path=path, row_length=128, heldout_rows=64, **more)

    people_alone = task.format(False)
    how = {
        "even": dict(
            objective="even",
            optim=config.optim("muon", muon_lr=0.01, lr=0.0015),
            data=rows(path=people_alone, augment=(people,)),
        ),
        "consistency": dict(
            objective="grpo",
            loss=dict(beta=0.05),
            batch_size=128,
            steps=a.rl,
            optim=config.optim("muon", muon_lr=0.002, lr=0.001, schedule="constant", warmup=0),
            data=config.data(row_length=128, heldout_rows=64),
            rollout=config.rollout(f"counterfactual(of={people_alone!r}, pairs=({people!r},))", group=32),
        ),
    }
    return dict(objective="sft", data=rows(path=task.format(True))), how[a.mitigate]
