"""Documents that a trained model writes, one after another, to be filtered and trained on with the rest.

FOLDER/synthetic/rows.jsonl   {"text", "prompt"}: row I answers prompt I modulo their number, with a seed of its own
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

from lmtrain import compilation, engine, evaluate, log, record, runs
from lmtrain.data import files, records
from lmtrain.data.messages import Unusable
from lmtrain.prepare.settings import Settings
from lmtrain.schema import Data
from lmtrain.types import LmtrainError

BATCH = 64  # rows that are written at once; a run that goes on does so behind a whole batch, to the same bits


def write(s: Settings, folder: pathlib.Path, progress: bool) -> pathlib.Path:
    """The file, with all s.count rows; what is there already is kept.

    A model that was trained on conversations replies to each prompt, and the reply is the text. Any other goes on from
    the prompt, and the text is both.

    Raises:
      LmtrainError: no such run, prompts that cannot be read, or that leave the model no positions.
    """
    prompts = read_prompts(s.prompts)
    file = folder / "synthetic" / "rows.jsonl"
    file.parent.mkdir(exist_ok=True)
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    if len(lines) == s.count:
        return file
    done = len(lines) // BATCH * BATCH
    file.write_bytes(b"".join(line + b"\n" for line in lines[:done]))
    compilation.use_cache()
    run = runs.load(s.synthetic)
    kept = record.open_record(run)
    chats = kept is not None and kept.stages[-1].kind in evaluate.CHATTED
    tok = run.tokenizer
    stop = run.template.stop if chats else (tok.end,)
    how = engine.Sampling(s.tokens, s.temperature, stop=stop)
    ids = [
        run.template.prompt([{"role": "user", "content": p}]) if chats else [tok.end, *tok.encode(p)] for p in prompts
    ]
    answers = engine.Engine(run.model, slots=BATCH)
    params = answers.prepare(run.params)
    log.say(f"synthetic: {s.count - done:,} documents by {run.folder / run.stage}, step {run.step}")
    with file.open("ab") as out:
        for first in range(done, s.count, BATCH):
            numbers = range(first, min(first + BATCH, s.count))
            completions = answers.run(params, [(ids[i % len(ids)], how.numbered(i)) for i in numbers])
            for i, completion in zip(numbers, completions, strict=True):
                prompt = prompts[i % len(prompts)]
                text = _reply(run, completion) if chats else prompt + tok.decode(completion.reply)
                out.write(json.dumps({"text": text, "prompt": prompt}).encode() + b"\n")
            out.flush()
            if progress:
                log.say(f"synthetic: {numbers.stop:,} of {s.count:,}")
    return file


def _reply(run: runs.Run, completion: engine.Completion) -> str:
    found: Any = run.template.parse(completion.tokens).get("content")
    return found if isinstance(found, str) else ""


def read_prompts(path: str) -> list[str]:
    """Of a JSON Lines file its rows' "prompt", of another its lines.

    Raises:
      LmtrainError: no such file, a row without a prompt, or no prompt at all.
    """
    prompts: list[str] = []
    for file in files.matching(path, "--prompts"):
        if file.name.removesuffix(".gz").endswith((".jsonl", ".ndjson")):
            for where, row in records.jsonl(Data(path=str(file))):
                if isinstance(row, Unusable):
                    raise row
                if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
                    raise LmtrainError(f'--prompts: {where}: an object with text in "prompt" was expected')
                prompts.append(row["prompt"])
        else:
            lines = (line.decode("utf-8", "replace").strip() for _, line in files.numbered(file))
            prompts += [line for line in lines if line]
    if not prompts:
        raise LmtrainError(f"--prompts {path}: no prompt in it")
    return prompts
