"""Preference optimisation on pairs of replies: DPO and its relatives, by the argument.

    lmtrain run --config experiments/dpo.py --workdir runs/dpo --config.stages.sft.data.path=pairs.jsonl \
        --config.stages.preference.data.path=pairs.jsonl
    lmtrain run --config experiments/dpo.py:simpo ...

Losses: dpo dpo_norm ipo kto simpo orpo (objectives/preference.py). SFT on the chosen replies comes first; `:init=RUN`
starts from a run. Rows: `prompt`, `chosen`, `rejected`. Reported: how often the model's implicit reward prefers the
chosen reply of held-out pairs, with its interval; chance gets one half (KTO has no pairs: its loss).

3 minutes on two cores with 574 pairs of AlpacaEval (`dpo.py:init=RUN,sft=60,steps=80`, 0.82M parameters): 88.0 % (80.9
to 92.7) of 117 held-out pairs; chance 50 %, taking the longer reply 86.5 %, so it has perhaps learned little else.
"""

from lmtrain import config, flags

LOSSES = ("dpo", "dpo_norm", "ipo", "kto", "simpo", "orpo")


def get_config(arg=""):
    a = config.parse_arg(arg, loss="dpo", init="", steps=200, sft=200, pretrain=400, row_length=1024)
    if a.loss not in LOSSES:
        raise flags.ConfigError(flags.unknown(a.loss, LOSSES, "a preference loss"))
    c = config.experiment()
    if not a.init:
        c.stages.tokenizer = config.tokenizer("bpe", vocab_size=1024, data=config.data("stdlib", path="docs"))
        c.stages.pretrain = config.stage(
            steps=a.pretrain,
            batch_size=8,
            model=config.model(layers=4, width=128, heads=4),
            data=config.data("stdlib", path="docs", row_length=256),
        )
    c.stages.sft = config.stage(
        objective="sft",
        init_from=a.init,
        steps=a.sft,
        batch_size=8,
        optim=config.optim("muon", muon_lr=0.01, lr=0.002),
        data=config.data(
            "jsonl", path="pairs.jsonl", columns={"completion": "chosen"}, row_length=a.row_length, heldout_fraction=0.2
        ),
    )
    c.stages.preference = config.stage(
        objective=a.loss,
        steps=a.steps,
        batch_size=8,
        eval_every=50,
        checkpoint_every=50,
        samples=0,
        optim=config.optim("muon", muon_lr=0.001, lr=0.0002),
        data=config.data("jsonl", path="pairs.jsonl", row_length=a.row_length, heldout_fraction=0.2, heldout_rows=0),
    )
    return c
