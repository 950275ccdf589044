"""Generation: prompts in, completions out, through a cache of slots that are refilled as soon as they are free.

The one path that samples text: rollouts, evaluations, `lmtrain generate`, chat. B rows (a request each), U prompts read
at once, T positions of a prompt, n steps, V vocabulary.

    engine = Engine(cfg)
    engine.submit(prompt, Sampling(max_tokens=64), tag="a")
    while done := engine.step(params): ...           # [("a", Completion)]; more may be submitted between steps

Shapes are powers of two, so that a few compiled programs serve all requests: the rows at work, the length of prompts,
and the places of the cache, which is never longer than the longest request at work needs. Growing and shrinking it
costs a copy, seldom; attention reads all of it at every step.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from lmtrain import schema
from lmtrain.mesh import batch_shards
from lmtrain.models import decode as decode_lib
from lmtrain.types import LmtrainError, Params

NEW = 8  # steps that write to the new part of the cache before it is added to the rest
STEPS = 16  # steps of one call of `Engine.step`, at most
FEW = 256  # rows * places of a cache that is not worth cutting shorter
READ = 1 << 14  # prompt positions that one call reads before it goes on with the others' replies


# ---------------------------------------------------------------------------------------------------- words of the API
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How one reply is drawn.

    Attributes:
      max_tokens: its longest length, the stop token included.
      temperature: logits are divided by it; 0 takes the likeliest token.
      top_k: only the k likeliest tokens; 0: all.
      top_p: only the likeliest tokens that together have this probability; 1: all.
      min_p: only tokens at least so many times as likely as the likeliest; 0: all.
      stop: token ids that end the reply.
      stop_texts: texts that end the reply; the Engine needs its `decode`.
      seed: a token's draw depends on the seed and its position alone.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[int, ...] = ()
    stop_texts: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.max_tokens <= 1 << 20:
            raise LmtrainError(f"max_tokens is {self.max_tokens}, but takes 1 to {1 << 20}.")
        if not 0 <= self.seed < 1 << 64:
            raise LmtrainError(f"seed is {self.seed}, but takes a whole number from 0 to {(1 << 64) - 1}.")
        if not 0 <= self.temperature < float("inf"):
            raise LmtrainError(f"temperature is {self.temperature}, but takes 0 (the likeliest token) or more.")
        if not 0 < self.top_p <= 1:
            raise LmtrainError(f"top_p is {self.top_p}, but takes a probability above 0 and up to 1.")
        if not 0 <= self.min_p <= 1:
            raise LmtrainError(f"min_p is {self.min_p}, but takes a share of the likeliest's probability, 0 to 1.")
        if not 0 <= self.top_k < 1 << 31:
            raise LmtrainError(f"top_k is {self.top_k}, but takes 0 (all tokens) or more.")
        if isinstance(self.stop_texts, str) or not all(self.stop_texts):
            raise LmtrainError(f"stop_texts is {self.stop_texts!r}, but takes a tuple of texts, none of them empty.")

    def numbered(self, i: int) -> Sampling:
        """The same with a seed of its own for the i-th of many requests; number 0 keeps the seed."""
        return dataclasses.replace(self, seed=(self.seed + (i << 32)) % (1 << 64))


@dataclasses.dataclass
class Completion:
    """What followed one prompt.

    Attributes:
      tokens: all that was sampled, the stop token included.
      logps: each one's log-probability under softmax(logits / temperature), whatever top-k, top-p and min-p left out
        (temperature 0: of temperature 1).
      finish: "stop" (a stop token or text ended it), else "length".
      stop_text: the text that ended it, if one did; then no token is a stop token.
    """

    tokens: list[int]
    logps: list[float]
    finish: str = "length"
    stop_text: str = ""

    @property
    def reply(self) -> list[int]:
        """The tokens without the stop token."""
        return self.tokens[:-1] if self.finish == "stop" and not self.stop_text else self.tokens


class Finished(NamedTuple):
    """A request that has ended: the tag it was submitted with, and its completion."""

    tag: Any
    completion: Completion


@dataclasses.dataclass
class Request:
    """A request at work or waiting. Its last token, sampled or of the prompt, is the next that the model reads."""

    tag: Any
    prompt: tuple[int, ...]
    sampling: Sampling
    completion: Completion

    @property
    def last(self) -> int:
        return self.completion.tokens[-1] if self.completion.tokens else self.prompt[-1]

    @property
    def position(self) -> int:
        """Of its last token."""
        return len(self.prompt) + len(self.completion.tokens) - 1

    @property
    def left(self) -> int:
        """Tokens that it may yet get."""
        return self.sampling.max_tokens - len(self.completion.tokens)


# ------------------------------------------------------------------------------------------------------------- engine
class Engine:
    """Answers requests, many at a time; a finished one makes room for the next that waits.

    What a request gets does not depend on its neighbours, its slot or when it came, up to the rounding of products of
    other shapes.

    Args:
      cfg: the model (resolved).
      mesh: where its parameters lie.
      slots: requests at work at once, at most.
      capacity: places that the cache has at least, so that fewer programs are compiled; 0: what the requests need.
      decode: token ids -> text, for Sampling.stop_texts.
    """

    def __init__(
        self, cfg: schema.Model, mesh: Mesh | None = None, slots: int = 64, capacity: int = 0,
        decode: Callable[[Sequence[int]], str] | None = None,
    ):  # fmt: skip
        if slots < 1 or capacity < 0:
            raise LmtrainError(f"slots is {slots} and capacity {capacity}, but they take at least 1 and 0.")
        self.cfg, self.mesh, self.slots, self.decode = cfg, mesh, slots, decode
        self.capacity = places_for(capacity)
        self._waiting: collections.deque[Request] = collections.deque()
        self._rows: list[Request | None] = []  # of the cache, each at work or free
        self._places = 0
        self._cache: Any = None
        self._given: Any = None  # the parameters as they were given, and laid out for decoding
        self._ready: decode_lib.Ready | None = None

    # ------------------------------------------------------------------------------------------------ requests
    @property
    def busy(self) -> int:
        """Requests that have not finished."""
        return len(self._waiting) + sum(r is not None for r in self._rows)

    def submit(self, prompt: Sequence[int], sampling: Sampling, tag: Any = None) -> Completion:
        """Adds a request: token ids to be continued. `step` returns the tag with the completion when it has ended.

        Returns:
          the completion, empty as yet, which grows with every step
        """
        if len(prompt) == 0:
            raise LmtrainError("a prompt without tokens: start it with the end-of-text token, as every document does.")
        if min(prompt) < 0 or max(prompt) >= self.cfg.vocab_size:
            raise LmtrainError(
                f"a prompt holds token {max(prompt) if min(prompt) >= 0 else min(prompt)}, but the model's vocabulary "
                f"is 0 to {self.cfg.vocab_size - 1}. Was it made with another tokenizer?"
            )
        read = len(prompt) + sampling.max_tokens - 1  # the last token of a reply is not read
        if self.cfg.max_positions and read > self.cfg.max_positions:
            raise LmtrainError(
                f"a prompt of {len(prompt)} tokens and {sampling.max_tokens} more, but the model's positions end at "
                f"{self.cfg.max_positions}: they are learned, not rotary. Ask for fewer tokens."
            )
        if sampling.stop_texts and self.decode is None:
            raise LmtrainError(f"stop_texts {sampling.stop_texts} takes an Engine with decode=tokenizer.decode.")
        request = Request(tag, tuple(map(int, prompt)), sampling, Completion([], []))
        self._waiting.append(request)
        return request.completion

    def prepare(self, params: Params | decode_lib.Ready) -> decode_lib.Ready:
        """The parameters laid out for decoding (one copy); all methods take them in place of the parameters."""
        return params if isinstance(params, decode_lib.Ready) else decode_lib.prepare(self.cfg, params, self.mesh)

    def step(self, params: Params | decode_lib.Ready, steps: int = STEPS) -> list[Finished]:
        """Reads prompts that wait where slots are free, goes on with every reply by up to so many tokens.

        Fewer where a quarter of the replies end before, so that their slots do not stay idle.

        The parameters are laid out for decoding (a copy of the layers, unless they lie so already) when others are
        given than in the call before, and let go once nothing is left to do.

        Returns:
          the requests that have ended, perhaps none
        """
        if not self.busy:
            return []
        if self._ready is None or params is not self._given:
            self._given, self._ready = params, self.prepare(params)
        self._read()
        steps = min(max(steps, 1), STEPS)
        self._fit(steps)
        drawn, self._cache = _steps(self._ready, self._cache, self._columns(), np.int32(steps), (STEPS, NEW))
        finished = self._record(*map(np.asarray, drawn))
        if not self.busy:
            self._given = self._ready = self._cache = None
            self._rows, self._places = [], 0
        return finished

    def run(
        self, params: Params | decode_lib.Ready, requests: Sequence[tuple[Sequence[int], Sampling]]
    ) -> list[Completion]:
        """Answers (prompt, sampling) pairs and returns their completions in order. None may be at work before."""
        if self.busy:
            raise LmtrainError(f"Engine.run: {self.busy} requests are at work; go on with step until busy is 0.")
        try:
            for i, (prompt, sampling) in enumerate(requests):
                self.submit(prompt, sampling, i)
        except LmtrainError:
            self._waiting.clear()
            raise
        done: dict[int, Completion] = {}
        while len(done) < len(requests):
            done.update(self.step(params))
        return [done[i] for i in range(len(requests))]

    # ----------------------------------------------------------------------------------------- prompts, steps
    def _read(self) -> None:
        """Reads waiting prompts where slots are free: those of one width at a time, oldest first, equal ones once."""
        budget = READ
        while self._waiting and budget > 0 and (free := self.slots - sum(r is not None for r in self._rows)):
            width = power_of_two(len(self._waiting[0].prompt), 16)
            prompts: dict[tuple[int, ...], int] = {}
            group: list[Request] = []
            for r in self._waiting:
                fits = r.prompt in prompts or len(prompts) * width < budget
                if len(group) < free and fits and power_of_two(len(r.prompt), 16) == width:
                    prompts.setdefault(r.prompt, len(prompts))
                    group.append(r)
            chosen = {id(r) for r in group}
            self._waiting = collections.deque(r for r in self._waiting if id(r) not in chosen)
            budget -= len(prompts) * width

            tokens_UT = np.zeros((self._padded(len(prompts)), width), np.int32)
            for prompt, u in prompts.items():
                tokens_UT[u, : len(prompt)] = prompt
            length_U = np.array([*map(len, prompts), *[1] * (len(tokens_UT) - len(prompts))], np.int32)
            kept = _read(self._ready, tokens_UT, length_U)
            self._fit(STEPS, group)
            source_B = np.full(len(self._rows), -1, np.int32)
            for r in group:
                row = self._rows.index(None)
                self._rows[row], source_B[row] = r, prompts[r.prompt]
            self._cache = _place(self._cache, kept, source_B, self.mesh)

    def _fit(self, steps: int, more: Sequence[Request] = ()) -> None:
        """Makes the cache as large as the requests at work and `more` need for so many steps."""
        work = [i for i, r in enumerate(self._rows) if r is not None]
        requests = [r for r in self._rows if r is not None] + list(more)
        rows, least = len(self._rows), self._padded(min(self.slots, len(requests) + len(self._waiting)))
        rows = rows if least <= rows < 4 * least else least  # a row or two less do not compile anew

        def needed(steps: int) -> int:  # the last run of NEW may be cut short, and is kept whole
            return places_for(max(r.position + -(-min(steps, r.left) // NEW) * NEW for r in requests))

        # With few rows attention is cheap, and a longer cache saves programs.
        roomy = min(needed(1 << 30), power_of_two(FEW // rows, 1))
        places = max(needed(steps), roomy, self.capacity)
        if self._cache is None:
            self._cache, self._rows = _empty(self._ready, rows, places), [None] * rows
        elif (rows, places) != (len(self._rows), self._places):
            take_B = None
            if rows != len(self._rows):
                take_B = np.array(work + [0] * (rows - len(work)), np.int32)
                self._rows = [self._rows[i] for i in work] + [None] * (rows - len(work))
            self._cache = _resize(self._cache, take_B, places, self.mesh)
        self._places = places

    def _padded(self, n: int) -> int:
        """Rows of an array that has to hold n: a power of two times the ways that the mesh splits them."""
        ways = 1 if self.mesh is None else batch_shards(self.mesh)
        return ways * power_of_two(-(-n // ways), 1)

    def _columns(self) -> dict[str, Any]:
        """What the device has to know of the requests at work, a column each; free rows have 0 tokens left."""
        idle = Sampling(temperature=0)
        how = [idle if r is None else r.sampling for r in self._rows]
        stops = power_of_two(max(1, *(len(h.stop) for h in how)), 1)
        return {
            "tokens_B": np.array([r.last if r else 0 for r in self._rows], np.int32),
            "position_B": np.array([r.position if r else 0 for r in self._rows], np.int32),
            "left_B": np.array([r.left if r else 0 for r in self._rows], np.int32),
            "stop_BC": np.array([[*h.stop, *[-1] * (stops - len(h.stop))] for h in how], np.int32),
            "how": {
                "temperature_B": np.array([h.temperature for h in how], np.float32),
                "top_k_B": np.array([h.top_k for h in how], np.int32),
                "top_p_B": np.array([h.top_p for h in how], np.float32),
                "min_p_B": np.array([h.min_p for h in how], np.float32),
                "key_B2": np.array([divmod(h.seed, 1 << 32) for h in how], np.uint32),
            },
        }

    def _record(self, tokens_nB: np.ndarray, logps_nB: np.ndarray) -> list[Finished]:
        """Adds what was drawn (-1: nothing) to the completions, and frees the rows of those that have ended."""
        finished = []
        for row, r in enumerate(self._rows):
            new = int((tokens_nB[:, row] >= 0).sum())
            if r is None or not new:
                continue
            c = r.completion
            c.tokens += tokens_nB[:new, row].tolist()
            c.logps += logps_nB[:new, row].tolist()
            if c.tokens[-1] in r.sampling.stop:
                c.finish = "stop"
            if r.sampling.stop_texts and self.decode is not None:
                _stop_at_text(c, new, r.sampling.stop_texts, self.decode)
            if c.finish == "stop" or not r.left:
                finished.append(Finished(r.tag, c))
                self._rows[row] = None
        return finished


def _stop_at_text(c: Completion, new: int, texts: Sequence[str], decode: Callable[[Sequence[int]], str]) -> None:
    """Cuts the completion behind the first of its new tokens with which it holds one of the texts."""
    whole = decode(c.reply)
    if not any(text in whole for text in texts):
        return
    for n in range(len(c.tokens) - new + 1, len(c.reply) + 1):
        said = decode(c.tokens[:n])
        for text in texts:
            if text in said:
                c.tokens, c.logps, c.finish, c.stop_text = c.tokens[:n], c.logps[:n], "stop", text
                return


def power_of_two(n: int, least: int) -> int:
    """The first power of two that is at least n and `least`."""
    return 1 << (max(n, least, 1) - 1).bit_length()


def places_for(n: int) -> int:
    """Places of a cache that has to hold n: a power of two, or above 128 one and a half times one.

    Attention reads every place at every step, so idle ones cost time; every length costs a program.
    """
    whole = power_of_two(n, 32)
    return 3 * whole // 4 if 128 < n <= 3 * whole // 4 else whole


# ------------------------------------------------------------------------------------------------- what is compiled
_empty = jax.jit(decode_lib.empty, static_argnums=(1, 2))
_resize = jax.jit(decode_lib.resize, static_argnums=(2, 3))
_read = jax.jit(decode_lib.read)
_place = jax.jit(decode_lib.place, static_argnums=3, donate_argnums=0)
_steps = jax.jit(decode_lib.steps, static_argnums=4, donate_argnums=1)


# --------------------------------------------------------------------------------------------------- list in, list out
def generate(
    cfg: schema.Model, params: Params | decode_lib.Ready, prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling], mesh: Mesh | None = None, slots: int = 64,
    decode: Callable[[Sequence[int]], str] | None = None,
) -> list[Completion]:  # fmt: skip
    """Completes every prompt (token ids, none empty) and returns one Completion for each, in order.

    Args:
      sampling: one for each prompt, or one for all: then prompt i draws as sampling.numbered(i).
    """
    how = [sampling.numbered(i) for i in range(len(prompts))] if isinstance(sampling, Sampling) else sampling
    return Engine(cfg, mesh, slots, decode=decode).run(params, list(zip(prompts, how, strict=True)))


def stream(
    cfg: schema.Model, params: Params | decode_lib.Ready, prompt: Sequence[int], sampling: Sampling,
    mesh: Mesh | None = None, decode: Callable[[Sequence[int]], str] | None = None,
) -> Iterator[int]:  # fmt: skip
    """Yields the tokens of the reply to one prompt as they come, without the stop token."""
    engine, given = Engine(cfg, mesh, slots=1, decode=decode), 0
    growing, ready = engine.submit(prompt, sampling), engine.prepare(params)
    while engine.busy:
        engine.step(ready, steps=4)
        yield from growing.reply[given:]
        given = len(growing.reply)
