"""A small subject with drawn parameters, and texts to score with it."""

import functools
import random

import jax
import jax.numpy as jnp
import numpy as np

from lmtrain import schema
from lmtrain.data import chat, tokenizer
from lmtrain.eval.subject import Settings, Subject
from lmtrain.models import transformer

WORDS = "the cat sat on a mat and then it ran far away while an old dog slept near big red boats".split()


def sentences(rng, count):
    """So many sentences of a few words, each with its full stop."""
    return [" ".join(rng.choices(WORDS, k=rng.randint(4, 8))).capitalize() + "." for _ in range(count)]


def documents(count, size=12, seed=0):
    """Texts of `size` sentences."""
    rng = random.Random(seed)
    return [" ".join(sentences(rng, size)) for _ in range(count)]


@functools.cache
def bpe():
    return tokenizer.train(documents(50), 400)


@functools.cache
def model(**fields):
    base = dict(layers=2, width=32, heads=4, kv_heads=2, mlp=48, zero_init=False)
    return transformer.resolve(schema.Model(**base | fields), bpe().vocab_size)


@functools.cache
def params(cfg):
    rng = np.random.default_rng(0)  # no compile; large enough that replies differ from prompt to prompt
    draw = lambda s: jnp.asarray(rng.normal(0.5 * (len(s.shape) < 3), 0.5, s.shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, transformer.shapes(cfg))


def subject(chat_format=False, longest=128, record=None, texts=None, **settings):
    """A model that has learned nothing, ready for any suite."""
    cfg = model()
    return Subject(
        name="toy", model=cfg, tokenizer=bpe(), params=params(cfg), template=lambda: chat.Template(bpe()),
        chat=chat_format, longest=longest, settings=Settings(**settings), record=record, texts=texts or {},
    )  # fmt: skip
