"""The quickstart: raw text to a small chat model, learned while you watch.

    make quickstart         or: lmtrain run --config experiments/quickstart.py --workdir runs/quickstart

Pretraining on Python's own documentation; supervised fine-tuning (SFT) on demonstrations of three small tasks, of which
three in ten are wrong, as people's are; reinforcement learning (GRPO) on two of them, from right or wrong alone; then
every stage scored on the same held-out problems. 0.8M parameters, 7 minutes on two cores. Expected: held-out bits per
byte 6.15 -> 1.68; right answers after SFT and after RL: addition 70 -> 93 %, sorting 57 -> 83 %.

`:control=shuffle` (zero, flip) gives RL rewards that must not help.
"""

from lmtrain import config

ADDITION, SORTING, SPELLING = (
    "addition(reversed=True, sloppy=0.3)",
    "sorting(least=2, most=3, sloppy=0.3)",
    "spelling(sloppy=0.3)",
)


def get_config(arg=""):
    a = config.parse_arg(arg, steps=1000, sft=1000, rl=90, control="none")
    model = config.model(layers=4, width=128, heads=4)
    c = config.experiment()
    # Few tokens beyond the 256 bytes: with so little compute, a large vocabulary would stay mostly unlearned.
    c.stages.tokenizer = config.tokenizer("bpe", vocab_size=288, train_bytes=5_000_000)
    c.stages.pretrain = config.stage(
        steps=a.steps,
        batch_size=8,
        eval_every=250,
        checkpoint_every=250,
        prompts=("", "class ", "Return "),
        samples=3,
        sample_tokens=320,
        model=model,
        data=config.data("stdlib", path="docs", row_length=128, heldout_rows=512),
    )
    # Conversations of one to three problems: after single questions only, a second one is answered badly.
    demonstrations = f"several(tasks={(ADDITION, SORTING, SPELLING)}, weights=(6, 1, 1), turns=3)"
    c.stages.sft = config.stage(
        objective="sft",
        steps=a.sft,
        batch_size=8,
        eval_every=250,
        checkpoint_every=250,
        data=config.data("task", path=demonstrations, limit=50_000, row_length=128),
    )
    c.stages.rl = config.stage(
        objective="grpo",
        steps=a.rl,
        batch_size=384,
        log_every=5,
        eval_every=30,
        checkpoint_every=30,
        data=config.data(row_length=128, heldout_rows=128),
        loss=dict(negative=0.0),  # from the good replies alone (BUILD_NOTES.md)
        optim=config.optim("muon", muon_lr=0.002, lr=0.001, schedule="constant", warmup=0),
        rollout=config.rollout(ADDITION, SORTING, group=8, slots=128, control=a.control),
    )
    c.stages.evaluation = config.evaluation(ADDITION, SORTING, SPELLING, rows=128, samples=16)
    return c
