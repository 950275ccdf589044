"""A model, a tokenizer and tasks small enough to roll out in a test."""

import dataclasses

import jax

from lmtrain import mesh as mesh_lib
from lmtrain import schema
from lmtrain.data import chat, tokenizer
from lmtrain.models import transformer
from lmtrain.objectives import policy
from lmtrain.rollout import rewards
from lmtrain.rollout.source import Rollouts

TOK = tokenizer.bytes_tokenizer()
TEMPLATE = chat.Template(TOK)
# A model that has learned nothing hardly ever says <|end|>: one token in eight ends a turn here.
TEMPLATE.stop = (*TEMPLATE.stop, *range(8, TOK.vocab_size, 8))
MODEL = transformer.resolve(
    schema.Model(layers=2, width=32, heads=2, zero_init=False, init_scale=0.5, dtype="float32"), TOK.vocab_size
)


class Parity:
    """Replies of an even number of characters score 1. One turn."""

    name = "parity"
    max_tokens = 12

    def rows(self, split):
        return [{"n": i, "split": split} for i in range(40)]

    def messages(self, row):
        return [{"role": "user", "content": f"{row['n']}?"}]

    def score(self, row, reply):
        return float(len(reply) % 2 == 0)

    def solution(self, row):
        return [{"role": "assistant", "content": "ab"}]


class Talk(Parity):
    """The same over three turns, with a user and a tool in between."""

    name = "talk"
    max_tokens = 6

    def respond(self, row, messages):
        turns = sum(m["role"] == "assistant" for m in messages)
        return [[{"role": "user", "content": "and?"}], [{"role": "tool", "content": "7"}], None][turns - 1]

    def score_conversation(self, row, messages):
        return {"a": 0.5, "b": float(len(messages) > 3)}


def mesh():
    return mesh_lib.make(schema.Mesh(), jax.devices()[:1])


def params(key=0, model=MODEL):
    return transformer.init(model, jax.random.key(key))


def stage(**rollout):
    data = rollout.pop("data", {})
    fields = {k: rollout.pop(k) for k in ("batch_size", "accumulate") if k in rollout}
    return schema.Stage(
        objective="dapo",
        loss=policy.Dapo(),
        batch_size=fields.get("batch_size", 8),
        accumulate=fields.get("accumulate", 1),
        data=schema.Data(row_length=96, **{"pack": False, **data}),
        rollout=schema.Rollout(tasks=("parity",), **{"group": 4, "slots": 8, **rollout}),
    )


def source(cfg=None, task=None, advantage="group", seed=0, specs=("score",), model=MODEL, **more):
    cfg = cfg or stage()
    m = more.pop("mesh", None) or mesh()
    reward = rewards.make(specs, lambda run: None, TOK.pad)
    return Rollouts(
        cfg, transformer.Forward(model, m), m, TEMPLATE, [task or Parity()], reward, advantage, TOK.pad, seed, **more
    )


def replace(cfg, **rollout):
    return dataclasses.replace(cfg, rollout=dataclasses.replace(cfg.rollout, **rollout))
