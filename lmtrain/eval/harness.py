"""A bridge to lm-evaluation-harness (pip install -e ".[lm-eval]"): a run is one of its models, its tasks run on it.

`lmtrain eval RUN --suite harness --tasks NAME --include_path FOLDER`, or from Python:

    lm_eval.simple_evaluate(harness.LM(subject), tasks=[...])

Contexts and continuations become ids as in lmtrain's own suites (likelihood.encode_pair), which do as the harness does.
Its chat contexts are texts; special tokens stand in them between two code points that are no characters.
"""

from __future__ import annotations

import logging
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from lmtrain.engine import Sampling
from lmtrain.eval import estimates
from lmtrain.eval.likelihood import begin, encode_pair
from lmtrain.eval.subject import Missing, Result, Subject
from lmtrain.types import LmtrainError, nearest

try:  # without it this module imports all the same, and says so when it is called
    from lm_eval.api.model import LM as _Base
except ImportError:
    _Base = object

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # noncharacters, which no text holds
_SPECIAL = re.compile(f"{_OPEN}(.*?){_CLOSE}")
MAX_TOKENS = 256  # of a reply, where a task does not say


def run(s: Subject) -> Result:
    """Runs the tasks of --tasks, and gives the mean of every metric with an interval over rows."""
    lm_eval = _installed()
    if not s.settings.tasks:
        raise Missing("suite harness needs the names of lm-evaluation-harness's tasks: --tasks NAME.")
    from lm_eval.tasks import TaskManager

    folder = s.settings.include_path
    if folder and not pathlib.Path(folder).is_dir():
        raise LmtrainError(f"--include_path {folder}: no such folder.")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every default that a task file leaves
    manager = TaskManager(include_path=folder or None)
    for name in s.settings.tasks:
        if name not in manager.all_tasks:
            raise LmtrainError(
                f"suite harness: lm-evaluation-harness has no task {name!r}.{nearest(name, manager.all_tasks)}"
                " --include_path FOLDER adds task files of yours."
            )
    try:
        manager.load(list(s.settings.tasks))
    except Exception as error:  # of many kinds: a broken task file, a data file or a network that is not there
        raise LmtrainError(f"suite harness: a task cannot be loaded: {type(error).__name__}: {error}") from None
    found = lm_eval.simple_evaluate(
        LM(s), tasks=list(s.settings.tasks), task_manager=manager, limit=s.settings.rows or None, bootstrap_iters=0,
        log_samples=True, apply_chat_template=s.chat, num_fewshot=s.settings.shots if s.settings.shots >= 0 else None,
        random_seed=s.settings.seed, numpy_random_seed=s.settings.seed, fewshot_random_seed=s.settings.seed,
    )  # fmt: skip
    result = Result()
    for name, samples in found["samples"].items():
        _report(name, samples, found["results"].get(name, {}), s.settings.seed, result)
    result.notes.append(
        f"lm-evaluation-harness {lm_eval.__version__}, asked {'in a chat' if s.chat else 'as plain text'}"
    )
    return result


def _report(name: str, samples: list[dict[str, Any]], totals: dict[str, Any], seed: int, result: Result) -> None:
    """The metrics that are a number for every row; those of the whole (perplexity, F1) without an interval, noted."""
    rows = [
        {"doc_id": x["doc_id"], "target": x["target"], "filter": x.get("filter", "none"), "resps": x["filtered_resps"]}
        | {metric: x[metric] for metric in x.get("metrics", ()) if metric in x}
        for x in samples
    ]
    result.details[name] = rows
    for kind in dict.fromkeys(row["filter"] for row in rows):
        some = [x for x in samples if x.get("filter", "none") == kind]
        for metric in dict.fromkeys(m for x in some for m in x.get("metrics", ())):
            values = [x[metric] for x in some if isinstance(x.get(metric), int | float)]
            called = f"{name}: {metric}" + (f" ({kind})" if kind != "none" else "")
            if len(values) == len(some):
                whole = all(0 <= v <= 1 for v in values)
                result.scores[called] = estimates.share(values, seed) if whole else estimates.mean(values, seed)
            elif (value := totals.get(f"{metric},{kind}")) is not None:
                result.notes.append(f"{called} is {value:.4f}, of all rows together; no interval")


def _installed() -> Any:
    try:
        import lm_eval
    except ImportError as error:
        raise Missing(
            f"suite harness needs lm-evaluation-harness ({error}), of the extra `lm-eval` (pip install -e '.[lm-eval]'"
            " in a checkout)."
        ) from None
    return lm_eval


class LM(_Base):
    """A run as lm-evaluation-harness sees models: three methods that answer its requests."""

    def __init__(self, subject: Subject):
        _installed()
        super().__init__()
        self.subject = subject

    # ------------------------------------------------------------------------------------------------ its three methods
    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p(continuation | context), whether every token of it is the likeliest) of every request."""
        pairs = [self._pair(*request.args) for request in requests]
        with self.subject.progress(len(pairs), "harness: log-likelihoods") as progress:
            return [(scored.total, scored.greedy) for scored in self.subject.likelihood(pairs, progress)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, in windows as its utils.get_rolling_token_windows cuts them, without overlap."""
        from lm_eval import utils

        s, pairs, owners = self.subject, [], []
        for i, request in enumerate(requests):
            ids = s.tokenizer.encode(request.args[0])
            for window in utils.get_rolling_token_windows(ids, begin(s.tokenizer)[0], s.longest, 1):
                pairs.append(utils.make_disjoint_window(window))
                owners.append(i)
        totals = [0.0] * len(requests)
        with s.progress(len(pairs), "harness: rolling log-likelihoods") as progress:
            for i, scored in zip(owners, s.likelihood(pairs, progress), strict=True):
                totals[i] += scored.total
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to one of the texts of `until`, which is not part of it."""
        s, out = self.subject, {}
        with s.progress(len(requests), "harness: generated") as progress:
            for i, request in enumerate(requests):
                context, kwargs = request.args
                how = self._sampling(dict(kwargs)).numbered(i)
                room = s.longest - how.max_tokens
                if room < 1:
                    raise LmtrainError(
                        f"suite harness: a task asks for replies of {how.max_tokens} tokens (max_gen_toks), which leave"
                        f" no room for a prompt in the {s.longest} positions that the model sees. Set a smaller one in"
                        " its generation_kwargs, or --row-length."
                    )
                s.engine.submit(self._ids(context)[-room:], how, tag=(i, how.stop_texts))
            while s.engine.busy:
                for (i, stop), reply in s.engine.step(s.params):
                    text = s.tokenizer.decode(reply.reply)
                    out[i] = text[: min([text.find(t) for t in stop if t in text], default=len(text))]
                    progress(1)
        return [out[i] for i in range(len(requests))]

    # ----------------------------------------------------------------------------------------------------- chat
    @property
    def tokenizer_name(self) -> str:
        """Stands for the tokenizer and the chat template in its cache of requests."""
        return f"{self.subject.tokenizer.fingerprint}-{self.subject.template().fingerprint}"

    def apply_chat_template(self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, up to the assistant's header."""
        if not add_generation_prompt:
            raise LmtrainError("suite harness: gen_prefix is not supported in a chat; ask with --format plain.")
        messages = [{"role": m["role"], "content": m["content"]} for m in chat_history]
        names = {i: name for name, i in self.subject.tokenizer.specials.items()}
        parts: list[str] = []
        plain: list[int] = []
        for i in self.subject.template().prompt(messages):
            if i in names:
                parts += [self.subject.tokenizer.decode(plain), f"{_OPEN}{names[i]}{_CLOSE}"]
                plain = []
            else:
                plain.append(i)
        return "".join([*parts, self.subject.tokenizer.decode(plain)])

    # ------------------------------------------------------------------------------------------------------ ids
    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if _OPEN not in context:
            return encode_pair(self.subject.tokenizer, context, continuation)
        return self._ids(context), self.subject.tokenizer.encode(continuation)

    def _ids(self, context: str) -> list[int]:
        tokenizer = self.subject.tokenizer
        if _OPEN not in context:
            return [*begin(tokenizer), *tokenizer.encode(context)]
        out: list[int] = []
        for k, part in enumerate(_SPECIAL.split(context)):
            out += [tokenizer.specials[part]] if k % 2 else tokenizer.encode(part)
        return out

    def _sampling(self, kwargs: dict[str, Any]) -> Sampling:
        """How its generation_kwargs say that a reply is drawn; refuses what would be ignored."""
        until = kwargs.pop("until", None) or []
        until = [until] if isinstance(until, str) else [text for text in until if text]
        names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        given = [kwargs.pop(name) for name in names if name in kwargs]
        limit = next((int(value) for value in given if value is not None), MAX_TOKENS)
        drawn = kwargs.pop("do_sample", None)
        temperature = float(kwargs.pop("temperature", 1.0 if drawn else 0.0) or 0.0)
        top_p, top_k = float(kwargs.pop("top_p", 1.0)), int(kwargs.pop("top_k", 0))
        if kwargs:
            raise LmtrainError(
                f"suite harness: generation_kwargs has {', '.join(kwargs)}, which lmtrain does not know."
            )
        s = self.subject
        return Sampling(
            limit, 0.0 if drawn is False else temperature, top_k, top_p, stop=s.template().stop if s.chat else
            (s.tokenizer.end,), stop_texts=tuple(until), seed=s.settings.seed,
        )  # fmt: skip
