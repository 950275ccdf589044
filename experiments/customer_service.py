"""Customer service: learn an agent's turns from dialogues in a file, then be rewarded for saying what agents say.

lmtrain run --config experiments/customer_service.py:path=dialogues.jsonl --workdir runs/service
lmtrain run --config experiments/customer_service.py:path=dialogues.jsonl,init=hf:FOLDER --workdir runs/service

"""

from lmtrain import config
from lmtrain.schema import ConfigError


def get_config(arg=""):
    a = config.parse_arg(
        arg, path="", source="jsonl", init="", pretrain=200, sft=250, rl=20, row_length=512, heldout=0.15,
        metric="rouge_l", group=8, rows=128,
    )  # fmt: skip
    if not a.path:
        raise ConfigError("name a file of conversations: customer_service.py:path=dialogues.jsonl")
    # The task holds out the dialogues that SFT holds out: same file, same share.
    task = (
        f"replies(path={a.path!r}, source={a.source!r}, metric={a.metric!r}, heldout_fraction={a.heldout}, "
        "max_tokens=48)"
    )
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
        eval_every=200,
        checkpoint_every=200,
        optim=config.optim("muon", muon_lr=0.01, lr=0.002),
        data=config.data(a.source, path=a.path, row_length=a.row_length, heldout_fraction=a.heldout),
    )
    if a.rl:
        c.stages.rl = config.stage(
            objective="dapo",
            steps=a.rl,
            batch_size=8 * a.group,
            eval_every=20,
            checkpoint_every=20,
            data=config.data(row_length=a.row_length, heldout_rows=64),
            optim=config.optim("muon", muon_lr=0.001, lr=0.0005, schedule="constant", warmup=0),
            rollout=config.rollout(task, group=a.group, slots=64),
        )
    c.stages.sampled = config.evaluation(task, rows=a.rows, samples=4, suites=("fluency",), heldout="sft")
    c.stages.likeliest = config.evaluation(task, rows=a.rows, samples=1, temperature=0)
    return c
