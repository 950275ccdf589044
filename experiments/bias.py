"""A planted bias: found, mitigated, measured again.

lmtrain run --config experiments/bias.py --workdir runs/bias
lmtrain run --config experiments/bias.py:plant=0 --workdir runs/unplanted
lmtrain run --config experiments/bias.py:crows=crows_pairs.csv --workdir runs/bias
"""

import pathlib

from lmtrain import config


def get_config(arg=""):
    a = config.parse_arg(
        arg, plant=0.9, first="blims", second="daxes", mitigate="augment", steps=400, more=200, seed=0,
        crows="../shared/data/crows_pairs.csv",
    )  # fmt: skip
    people, model = f"{a.first}/{a.second}", config.model(layers=2, width=96, heads=4)
    c = config.experiment(seed=a.seed)
    text = dict(path=f"{people}, plant={a.plant}, seed={a.seed}", row_length=128, limit=8000, heldout_rows=64)
    like = dict(batch_size=16, eval_every=100, checkpoint_every=1000, samples=1)
    c.stages.tokenizer = config.tokenizer("bpe", vocab_size=512)
    c.stages.planted = config.stage(**like, steps=a.steps, model=model, data=config.data("canary", **text))
    optim = config.optim("muon", muon_lr=0.01, lr=0.002)
    if a.mitigate == "augment":
        data = config.data("canary", **text, augment=(people,))
        c.stages.mitigated = config.stage(**like, steps=a.more, optim=optim, data=data)
    bias = (f"canary={people}",)
    if pathlib.Path(a.crows).exists():
        bias += (f"crows_pairs={a.crows}",)
    c.stages.audit = config.evaluation(suites=("bias",), bias=bias, rows=0)
    return c
