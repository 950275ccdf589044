"""Customer service: learn the agents' turns of dialogues in a file; how near do the replies come to the real ones?

lmtrain run --config experiments/customer_service.py:path=dialogues.jsonl --workdir runs/service
lmtrain run --config experiments/customer_service.py:path=dialogues.jsonl,init=hf:FOLDER --workdir runs/service

The file holds conversations in any format that SFT reads (docs/chat-data.md; `source=openai` and so on); 15 in 100 are
held out whole. Of each, one turn of the agent's is to be said (lmtrain/tasks/replies.py), sampled and likeliest,
and compared with the real one (`metric`, ROUGE-L by default). `rl=20` adds reinforcement by that likeness.

0.92M parameters, 11 minutes of CPU time with RL. Measured with 1,200 dialogues, one seed:
held-out bits per byte 4.14 -> 1.32 (gzip -9 2.33); ROUGE-L of the likeliest reply 0 -> 15.1 % (11.8 to 18.7), sampled
0.1 -> 8.2. 20 steps of RL gained nothing sure (14.6 and 8.7 %) and cost bits (1.35).
"""

from lmtrain import config
from lmtrain.schema import ConfigError


def get_config(arg=""):
    a = config.parse_arg(
        arg, path="", source="jsonl", init="", pretrain=200, sft=250, rl=0, row_length=512, heldout=0.15,
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
