"""A reward model from pairs of replies: which of two would a person prefer (Bradley-Terry)?

    lmtrain run --config experiments/reward.py --workdir runs/reward --config.stages.reward.data.path=pairs.jsonl

Rows: `prompt`, `chosen`, `rejected` (text, or messages). `:init=RUN` starts from a run instead of a short pretraining
of its own. Reported: accuracy on held-out pairs, with its interval, beside the half that chance gets.

5 minutes on two busy cores with 593 pairs of AlpacaEval (0.92M parameters, from a run). Of 122 held-out pairs 83.6 %
right after 100 steps, 81.1 % (73.3 to 87.1) after 300, by when the training loss is 0; chance 50 %, the longer 66 %.
"""

from lmtrain import config


def get_config(arg=""):
    a = config.parse_arg(arg, init="", steps=120, pretrain=400, row_length=1024)
    c = config.experiment()
    if not a.init:
        c.stages.tokenizer = config.tokenizer("bpe", vocab_size=1024, data=config.data("stdlib", path="docs"))
        c.stages.pretrain = config.stage(
            steps=a.pretrain,
            batch_size=8,
            model=config.model(layers=4, width=128, heads=4),
            data=config.data("stdlib", path="docs", row_length=256),
        )
    c.stages.reward = config.stage(
        objective="reward",
        init_from=a.init,
        steps=a.steps,
        batch_size=8,
        eval_every=50,
        checkpoint_every=50,
        samples=0,
        optim=config.optim("muon", muon_lr=0.002, lr=0.0005),
        data=config.data("jsonl", path="pairs.jsonl", row_length=a.row_length, heldout_fraction=0.2, heldout_rows=0),
    )
    return c
