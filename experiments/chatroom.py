"""A simulated chat room: a model learns to hold a conversation that is informative and keeps to the point.

    lmtrain run --config experiments/chatroom.py --workdir runs/chatroom

A scripted user asks about a place and the model answers from what it was told (lmtrain/tasks/chatroom.py). SFT learns
from demonstrations of which two in three go wrong somewhere; a reward model learns to prefer good conversations to
sloppy ones; RL is rewarded by both that model and what can be checked: on topic, no repetition, right length, facts
given. Places are made up and those held out are in no training conversation. Reported: the reward of whole
conversations on held-out personas, part by part, before and after; whole conversations are kept in rl/samples.jsonl.

0.84M parameters, 12 minutes on two cores. Expected, SFT -> RL, 128 held-out personas: reward 58 -> 78 %; on topic
80 -> 99, no repetition 90 -> 99, length 100 -> 100, facts 33 -> 43, reward model 22 -> 63.
"""

from lmtrain import config


def get_config(arg=""):
    a = config.parse_arg(arg, sft=1500, reward=100, steps=80, group=8)
    task = "chatroom(sloppy=0.66)"
    c = config.experiment()
    # From the conversations themselves, so that a name is one token: to find a fact then takes far fewer steps.
    c.stages.tokenizer = config.tokenizer("bpe", vocab_size=400, train_bytes=2_000_000)
    c.stages.sft = config.stage(
        objective="sft",
        steps=a.sft,
        batch_size=8,
        eval_every=500,
        checkpoint_every=250,
        model=config.model(layers=4, width=128, heads=4),
        data=config.data("task", path=task, limit=50_000, row_length=256),
    )
    c.stages.reward = config.stage(
        objective="reward",
        steps=a.reward,
        batch_size=8,
        eval_every=50,
        checkpoint_every=50,
        samples=0,
        optim=config.optim("muon", muon_lr=0.005, lr=0.001),
        data=config.data("task", path=task, limit=4000, row_length=256),
    )
    c.stages.rl = config.stage(
        objective="dapo",
        init_from="sft",
        steps=a.steps,
        batch_size=128,
        eval_every=20,
        checkpoint_every=20,
        samples=4,
        data=config.data(row_length=256, heldout_rows=128),
        optim=config.optim("muon", muon_lr=0.002, lr=0.001, schedule="constant", warmup=0),
        rollout=config.rollout(task, group=a.group, turns=4, rewards=("score", "0.5*model(reward)")),
    )
    return c
