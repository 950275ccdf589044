"""Accuracy: tasks answered and scored; multiple choice by log-likelihood; short answers to plain text.

How a task is asked:
    choices(row)   the likeliest choice counts, nothing is generated (tasks/multiple_choice.py)
    plain(row)     one reply, up to a text of `stop` (tasks/questions.py); a model that does not chat goes on from that
    else           in a conversation, by the chat template, like reinforcement learning's

Replies are the likeliest tokens (temperature 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lmtrain.engine import Sampling
from lmtrain.eval import estimates
from lmtrain.eval import tasks as played_lib
from lmtrain.eval.likelihood import Pair, begin, encode_pair
from lmtrain.eval.subject import Missing, Result, Subject
from lmtrain.rollout import rewards
from lmtrain.types import LmtrainError


def run(s: Subject) -> Result:
    """Scores every task on its first settings.rows held-out rows."""
    specs = s.settings.tasks or (s.record.tasks() if s.record else ())
    if not specs:
        raise Missing(f"suite accuracy needs tasks, and {s.name} was trained on none: give --tasks NAME.")
    result = Result()
    for name, task in rewards.get_tasks(specs).items():
        rows = task.rows("heldout")
        rows = [rows[i] for i in range(min(s.settings.rows or len(rows), len(rows)))]
        if hasattr(task, "choices"):
            _choices(s, name, task, rows, result)
        elif hasattr(task, "plain"):
            _reply(s, name, task, rows, result)
        else:
            _chat(s, name, task, rows, result)
    return result


# ------------------------------------------------------------------------------------------------------ multiple choice
def choice_pairs(s: Subject, task: Any, row: dict[str, Any]) -> list[Pair]:
    """What is scored for each choice: behind the chat template's header, or behind the plain prompt and a delimiter."""
    if s.chat:
        context = s.template().prompt(task.messages(row))
        return [(context, s.tokenizer.encode(choice)) for choice in task.choices(row)]
    return [encode_pair(s.tokenizer, task.plain(row), task.delimiter + choice) for choice in task.choices(row)]


def chosen(logps: Sequence[float], choices: Sequence[str]) -> dict[str, int]:
    """The choice that each rule takes; of equals the first. The names and rules are lm-evaluation-harness's (0.4.13,
    api/task.py, ConfigurableTask.process_results):

    acc        the largest log p(choice)
    acc_norm   the largest log p(choice) / characters of the choice
    acc_bytes  the largest log p(choice) / its bytes in UTF-8
    """
    total = np.asarray(logps, float)
    characters = np.array([len(c) for c in choices], float)
    size = np.array([len(c.encode()) for c in choices], float)
    return {
        "acc": int(total.argmax()),
        "acc_norm": int((total / characters).argmax()),
        "acc_bytes": int((total / size).argmax()),
    }


def _choices(s: Subject, name: str, task: Any, rows: Sequence[dict[str, Any]], result: Result) -> None:
    pairs = [choice_pairs(s, task, row) for row in rows]
    with s.progress(sum(map(len, pairs)), f"accuracy: {name}, choices") as progress:
        scored = iter(s.likelihood([pair for some in pairs for pair in some], progress))
    told = []
    for row, some in zip(rows, pairs, strict=True):
        logps = [next(scored).total for _ in some]
        took = chosen(logps, task.choices(row))
        told.append({"where": row.get("where", ""), "logps": logps, "right": row["right"], "chosen": took}
                    | {rule: float(k == row["right"]) for rule, k in took.items()})  # fmt: skip
    for rule in ("acc", "acc_norm", "acc_bytes"):
        result.scores[f"{name}: {rule}"] = estimates.share([row[rule] for row in told], s.settings.seed)
    chance = np.mean([1 / len(some) for some in pairs])
    result.notes.append(f"{name}: choices by log-likelihood, asked {_asked(s)}; {chance:.1%} by chance")
    result.details[name] = told


# ----------------------------------------------------------------------------------------------------------- generated
def complete(s: Subject, prompts: Sequence[list[int]], max_tokens: int, stop: Sequence[str], name: str) -> list[str]:
    """What the likeliest tokens say behind each prompt, up to a stop text, the end of a turn or of the document.

    A prompt that leaves no room for `max_tokens` in what the model sees at once loses its beginning.
    """
    room = s.longest - max_tokens
    if room < 1:
        raise LmtrainError(
            f"{name}: replies of {max_tokens} tokens leave no room for a prompt in the {s.longest} positions that the"
            " model sees: a smaller max_tokens, or --row-length."
        )
    ends = s.template().stop if s.chat else (s.tokenizer.end,)
    how = Sampling(max_tokens, temperature=0, stop=ends, stop_texts=tuple(stop))
    out: dict[int, str] = {}
    with s.progress(len(prompts), name) as progress:
        for i, prompt in enumerate(prompts):
            s.engine.submit(prompt[-room:], how, tag=i)
        while s.engine.busy:
            for i, reply in s.engine.step(s.params):
                text = s.tokenizer.decode(reply.reply)
                out[i] = text[: min([text.find(t) for t in stop if t in text], default=len(text))]
                progress(1)
    return [out[i] for i in range(len(prompts))]


def _reply(s: Subject, name: str, task: Any, rows: Sequence[dict[str, Any]], result: Result) -> None:
    if s.chat:
        template = s.template()
        prompts = [template.prompt(task.messages(row)) for row in rows]
    else:
        prompts = [[*begin(s.tokenizer), *s.tokenizer.encode(task.plain(row))] for row in rows]
    replies = complete(s, prompts, task.max_tokens, task.stop, f"accuracy: {name}")
    told = [
        {"where": row.get("where", ""), "reply": reply, "score": float(task.score(row, reply))}
        for row, reply in zip(rows, replies, strict=True)
    ]
    result.scores[f"{name}: score"] = estimates.share([row["score"] for row in told], s.settings.seed)
    result.notes.append(f"{name}: generated, asked {_asked(s)}")
    result.details[name] = told


def _chat(s: Subject, name: str, task: Any, rows: Sequence[dict[str, Any]], result: Result) -> None:
    with s.progress(len(rows), f"accuracy: {name}") as progress:
        found = played_lib.score(
            s.engine, s.params, s.template(), task, rows=len(rows), temperature=0.0, longest=s.longest,
            seed=s.settings.seed, progress=progress,
        )  # fmt: skip
    told = [
        {"where": e.row.get("where", ""), "reply": e.reply, "score": float(np.mean(list(e.scores.values())))}
        for e in found.played
    ]
    result.scores[f"{name}: score"] = estimates.share([row["score"] for row in told], s.settings.seed)
    result.notes.append(f"{name}: generated, asked in a chat; {found.summary['truncated']:.1%} of the replies cut")
    result.details[name] = told


def _asked(s: Subject) -> str:
    return "in a chat" if s.chat else "as plain text"
