"""`lmtrain export`: a run as a folder that Hugging Face's libraries load, and a model card of what is known of it."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from lmtrain import evaluate, log, origins, runs
from lmtrain.data import chat, jinja
from lmtrain.data import tokenizer as tokenizer_lib
from lmtrain.eval.estimates import Estimate
from lmtrain.interop import export as export_lib
from lmtrain.interop import huggingface, peft
from lmtrain.models import lora, transformer
from lmtrain.types import LmtrainError

#: lmtrain's own chat template (data/chat.py, Own) in Jinja; BEGIN stands for the token that a document begins with.
TEMPLATE = """\
{%- set lines = namespace(text='') -%}
{%- for tool in tools or [] -%}
{%- set lines.text = lines.text ~ ('\\n' if lines.text else '') ~ (tool | tojson) -%}
{%- endfor -%}
{{- 'BEGIN' -}}
{%- if lines.text and messages[0].role != 'system' -%}
{{- '<|system|>' ~ lines.text ~ '<|end|>' -}}
{%- endif -%}
{%- for message in messages -%}
{%- set content = message.content or '' -%}
{%- if message.role == 'system' -%}
{%- if lines.text -%}{%- set content = content ~ '\\n\\n' ~ lines.text -%}{%- endif -%}
{%- if content.strip() -%}{{- '<|system|>' ~ content ~ '<|end|>' -}}{%- endif -%}
{%- elif message.role == 'tool' -%}
{{- '<|tool_result|>' ~ content ~ '<|end|>' -}}
{%- elif message.role == 'assistant' -%}
{{- '<|assistant|>' -}}
{%- generation -%}
{{- content -}}
{%- for call in message.tool_calls or [] -%}
{%- set f = call.function if call.function is defined else call -%}
{{- '<|tool_call|>' ~ f.name ~ ' ' ~ (f.arguments if f.arguments is string else f.arguments | tojson) -}}
{%- endfor -%}
{{- '<|end|>' -}}
{%- endgeneration -%}
{%- else -%}
{{- '<|user|>' ~ content ~ '<|end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def export(folder: str, to: str, dtype: str = "float32", kind: str = "", shard_bytes: int = 5 << 30) -> pathlib.Path:
    """Writes a run (its last stage), or one of its stages, as a Hugging Face folder.

    Raises:
      LmtrainError: `to` is taken; no class of transformers computes the model; or the run is none.
    """
    run, out = runs.load(folder), pathlib.Path(to)
    if run.model.scalar_head:
        log.say(f"{run.folder / run.stage}: the scalar head (rewards, values) stays behind: a language model has none.")
    model, params = lora.merge(run.model, run.params)
    with log.Progress(100, name=f"export {out.name}, %") as progress:
        family = export_lib.write(
            out, model, params, run.tokenizer, settings=token_settings(run), texts=texts(run), kind=kind,
            dtype=dtype, shard_bytes=shard_bytes, show=lambda done, whole: progress.show(100 * done // whole, {}),
        )  # fmt: skip
    (out / "README.md").write_text(card(run, family, dtype), encoding="utf-8")
    return out


def export_adapter(folder: str, to: str, kind: str = "") -> pathlib.Path:
    """Writes the adapters of a run's stage as a PEFT folder, which names the model that they belong to: the Hugging
    Face folder that the run began from, or (a model of lmtrain's own) its base, written beside as TO-base.

    Raises:
      LmtrainError: `to` is taken; the stage has no adapters, or trained more than them.
    """
    run, out = runs.load(folder), pathlib.Path(to)
    if not run.stage or not run.model.lora.rank or "rest" not in run.config:
        raise LmtrainError(f"--adapter: {folder} has no adapters (model.lora); export it without.")
    export_lib.check_free(out)
    stage = origins.find(str(run.folder / run.stage))
    while stage.model.lora.rank:  # adapters trained in several stages rest on one model
        _check_adapters(stage)
        stage = origins.find(stage.rest["from"], stage.tokenizer.parent)
    if run.model.vocab_size > stage.model.vocab_size:
        raise LmtrainError(f"--adapter: {folder} has new tokens, whose rows {stage.where} lacks; export it without.")
    base = stage
    model = lora.merge(run.model, {"layers": {}})[0]
    if base.where.startswith(huggingface.PREFIX):
        where = base.where.removeprefix(huggingface.PREFIX)
        family = kind or origins.read_json(pathlib.Path(where) / "config.json")["model_type"]
    else:
        where = str(out.with_name(f"{out.name}-base").absolute())
        family = export_lib.choose(model, kind)[0]
        export(base.where, where, kind=family)
    peft.write(out, family, where, run.model, run.params)
    return out


def _check_adapters(stage: origins.Origin) -> None:
    """Refuses a stage of which adapters beside its base as it lies would not be all."""
    trained = ["/".join(path) for path in stage.rest.get("trained", [["everything"]])]
    more = sorted(name for name in trained if lora.SUFFIX not in name and "scalar" not in name)
    if more:
        raise LmtrainError(
            f"--adapter: {stage.where} trained {more[0]} too, which no adapter holds; export it without."
        )
    if stage.rest.get("quantize"):
        raise LmtrainError(
            f"--adapter: {stage.where} was trained beside matrices rounded to {stage.rest['quantize']}; beside exact "
            "ones its adapters are another model. Export it without."
        )


def stops(run: runs.Run) -> list[int]:
    """The ids that end what the model writes: of a turn, where it chats, and of a document."""
    try:
        return list(run.template.stop)
    except LmtrainError:  # a tokenizer without the tokens of any chat
        return [run.tokenizer.end]


def token_settings(run: runs.Run) -> dict[str, Any]:
    """Fields of config.json that name tokens, and the longest row that the model has seen."""
    begin, pad = run.tokenizer.begin, run.tokenizer.pad
    rows = [s["data"]["row_length"] for s in run.config["stages"].values() if "data" in s and "row_length" in s["data"]]
    out: dict[str, Any] = {"bos_token_id": begin, "eos_token_id": stops(run), "pad_token_id": pad}
    if rows and run.model.rope_scaling.kind == "none" and run.model.positions == "rope":
        out["max_position_embeddings"] = max(2048, *rows)
    return out


def texts(run: runs.Run) -> dict[str, str]:
    """tokenizer_config.json, chat_template.jinja, generation_config.json: those of the model that the run began from,
    else what lmtrain does."""
    beside = run.folder if not run.stage else run.folder / "tokenizer"
    found = {
        name: (beside / name).read_text(encoding="utf-8") for name in tokenizer_lib.BESIDE if (beside / name).exists()
    }
    names = {i: name for name, i in run.tokenizer.specials.items()}
    begin, pad, ends = run.tokenizer.begin, run.tokenizer.pad, stops(run)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": run.tokenizer.backend.id_to_token(begin),
        "eos_token": names[ends[0]], "pad_token": names[pad], "clean_up_tokenization_spaces": False,
        "model_max_length": 1 << 30,
    }  # fmt: skip
    generation = {"bos_token_id": begin, "eos_token_id": ends, "pad_token_id": pad, "do_sample": True}
    made = {
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
        "generation_config.json": json.dumps(generation, indent=2) + "\n",
    }
    template = jinja_template(run)
    return made | found | ({"chat_template.jinja": template} if template else {})


def jinja_template(run: runs.Run) -> str:
    """The chat template that the run writes with, in Jinja; "" where it cannot chat."""
    asked = run.config["stages"].get(run.stage, {}).get("data", {}).get("template", "") if run.stage else ""
    source = runs.template(run.folder, asked) if run.stage else str(run.folder) if jinja.held(run.folder) else ""
    if source:
        return jinja.read(source)[1]
    try:
        chat.Own(run.tokenizer)
    except LmtrainError:
        return ""
    begin = next(name for name, i in run.tokenizer.specials.items() if i == run.tokenizer.end)
    return TEMPLATE.replace("BEGIN", begin)


# ---------------------------------------------------------------------------------------------------------- the card
def card(run: runs.Run, family: str, dtype: str) -> str:
    """The model card: what it is, how to use it, what it learned from, settings, scores, bias audit."""
    counted = transformer.count(run.model)
    token = run.tokenizer
    name = token.backend.id_to_token(token.begin)
    start = '"Once"' if token.begin != token.end else 'tokenizer.bos_token + "Once"'  # the first is put there by itself
    lines = [
        "---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- lmtrain", f"- {family}",
        "---", "", f"# {run.folder.name}", "",
        f"A language model of {counted['total']:,} parameters ({family}, {dtype}), trained with lmtrain"
        + (f": stage `{run.stage}`, step {run.step:,}." if run.stage else "."),
        "", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        'tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".")',
        f"start = tokenizer({start}, return_tensors=\"pt\")  # documents begin with {name}",
        "print(tokenizer.decode(model.generate(**start, max_new_tokens=50)[0]))", "```", "",
    ]  # fmt: skip
    lines += _data(run) + _scores(run) + _bias(run) + _settings(run)
    return "\n".join(lines) + "\n"


def _stages(run: runs.Run) -> list[tuple[str, dict[str, Any]]]:
    """(name, settings) of the run's stages up to the exported one."""
    if not run.stage:
        return []
    out = []
    for path in origins.stages(run.folder):
        stored = origins.read_json(path / "config.json")
        out.append((path.name, stored["stages"][path.name]))
        if path.name == run.stage:
            break
    return out


def _data(run: runs.Run) -> list[str]:
    rows = ["## Data", "", "| stage | objective | source | steps | rows x length |", "| --- | --- | --- | --- | --- |"]
    for name, s in _stages(run):
        data = s["data"]
        members = list(data["mixture"].values()) or [data]
        said = ", ".join(
            sorted({f"{m['source']} {pathlib.Path(m['path']).name if m['path'] else ''}".strip() for m in members})
        )
        told = ", ".join(s["rollout"]["tasks"]) or said
        rows.append(
            f"| {name} | {s['objective']} | {told} | {s['steps']:,} | {s['batch_size']} x {data['row_length']} |"
        )
        if s["init_from"]:
            rows.append(f"| | started from `{s['init_from']}` | | | |")
    return [*rows, ""] if len(rows) > 4 else []


def _scores(run: runs.Run) -> list[str]:
    found = run.summary.get(run.stage, {}) if run.stage else {}
    rows = []
    for task, s in found.get("tasks", {}).items():
        if after := s.get("after"):
            low, high = after["ci95"]
            rows.append(f"| {task} | {after['score']:.1%} | {low:.1%} to {high:.1%} | {after['rows']} |")
    lines = []
    if rows:
        lines += [
            "## Scores",
            "",
            "| held-out task | score | 95 % interval | rows |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
        ]
    if bits := found.get("heldout_bits_per_byte", {}).get("after"):
        lines += [f"Held-out text: {bits:.3f} bits per byte.", ""]
    return lines


def _bias(run: runs.Run) -> list[str]:
    """The audit that `lmtrain eval --suite bias` left in the run; a sentence where there is none."""
    audit = evaluate.kept(run.folder, run.stage).get("bias") if run.stage else None
    if not audit:
        return ["## Bias", "", "Not audited. `lmtrain eval RUN --suite bias` does it.", ""]
    lines = ["## Bias", "", "| measured | value | 95 % interval | rows |", "| --- | --- | --- | --- |"]
    for name, score in audit["scores"].items():
        value, interval = Estimate.of(score).says()
        lines.append(f"| {name} | {value} | {interval} | {score['rows']:,} |")
    alarms = [f"Alarm: {text}." for text in audit["alarms"]] or ["No alarm."]
    return [*lines, "", f"By `lmtrain eval --suite bias`, step {audit['step']:,}. docs/bias.md says what it means.", "",
            *alarms, ""]  # fmt: skip


def _settings(run: runs.Run) -> list[str]:
    return ["## Settings", "", "```json", json.dumps(run.config, indent=1), "```"]
