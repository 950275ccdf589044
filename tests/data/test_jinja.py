"""Hugging Face templates, written here in the styles in use; compared with `transformers` where that is installed."""

import datetime
import json
import sys

import pytest
import tokenizers

from lmtrain.data import tokenizer
from lmtrain.data.chat import Template
from lmtrain.data.messages import Unusable
from lmtrain.types import LmtrainError

pytest.importorskip("jinja2")

CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '# Tools' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- GENERATION %}
        {{- message.content }}
        {%- for call in message.tool_calls %}
            {%- if call.function is defined %}{%- set call = call.function %}{%- endif %}
            {%- if loop.first and message.content or not loop.first %}{{- '\\n' }}{%- endif %}
            {{- '<tool_call>\\n{"name": "' ~ call.name ~ '", "arguments": ' ~ call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- ENDGENERATION %}
        {{- '\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
LLAMA = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['role'] == 'system' %}{{- 'Today is ' + strftime_now('%d %b %Y') + '.\\n' }}{%- endif %}
    {%- if message['role'] == 'assistant' %}
        {%- GENERATION %}{{- message['content'] | trim + '<|eot_id|>' }}{%- ENDGENERATION %}
    {%- else %}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- '<start_of_turn>' + role + '\\n' }}
{%- if role == 'model' %}
{%- GENERATION %}{{- message['content'] | trim + '<end_of_turn>' }}{%- ENDGENERATION %}{{- '\\n' }}
{%- else %}{{- message['content'] | trim + '<end_of_turn>\\n' }}{%- endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""
MISTRAL = """\
{{- bos_token }}{%- for message in messages %}
{%- if message.role == 'user' %}{{- '[INST] ' + message.content + ' [/INST]' }}
{%- else %}{%- GENERATION %}{{- ' ' + message.content + eos_token }}{%- ENDGENERATION %}{%- endif %}{%- endfor %}
"""
# Earlier reasoning is dropped, and there is no special token at a turn's end.
FORGETFUL = """\
{%- for m in messages %}{%- if m.role == 'assistant' %}
{{- 'A: ' + (m.content if loop.last else m.content.split('</think>')[-1]) + '\\n' }}
{%- else %}{{- 'U: ' + m.content + '\\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- 'A: ' }}{%- endif %}
"""
BLOCKS, PLAIN = ("generation %}", "endgeneration %}"), ("if true %}", "endif %}")
NAMES = {
    "<|endoftext|>": "<s>", "<|pad|>": "</s>", "<|system|>": "<|im_start|>", "<|user|>": "<|im_end|>",
    "<|assistant|>": "<|start_header_id|>", "<|tool_call|>": "<|end_header_id|>", "<|tool_result|>": "<|eot_id|>",
    "<|end|>": "<end_of_turn>",
}  # fmt: skip
CALL = {"name": "weather", "arguments": '{"city": "K\u00f8benhavn <|im_end|>", "n": [1, 2]}'}
SPELT = "Write <|im_end|> and </s><end_of_turn> please <|eot_id|>"
SIMPLE = [
    {"role": "user", "content": "Hello there, who are you?"},
    {"role": "assistant", "content": "I am a machine, and you?"},
    {"role": "user", "content": "A person\n\nof two lines \U0001f600"},
    {"role": "assistant", "content": "Nice."},
]
LATIN = [{**m, "content": m["content"].replace("\U0001f600", "!")} for m in SIMPLE]
SYSTEM = [{"role": "system", "content": "Be brief."}, *SIMPLE]
WITH_TOOLS = [
    *SYSTEM,
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "dry"},
    {"role": "tool", "content": "wet"},
    {"role": "assistant", "content": "Both."},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "It's <b>here</b>"}}]
EVERY = {
    "chatml": (CHATML, SYSTEM, ()), "chatml tools": (CHATML, WITH_TOOLS, TOOLS), "llama": (LLAMA, SYSTEM, ()),
    "gemma": (GEMMA, SIMPLE, ()), "mistral": (MISTRAL, SIMPLE, ()),
}  # fmt: skip


def spec():
    bpe = tokenizer.train(
        [m["content"] * 3 for m in WITH_TOOLS] + ["assistant user system model Today is", "a\n\nb" * 9], 330
    )
    text = json.dumps(json.loads(bpe.backend.to_str()))
    for own, other in NAMES.items():
        text = text.replace(own, other)
    return text


SPEC = spec()
TOK = tokenizer.Tokenizer(tokenizers.Tokenizer.from_str(SPEC))


def template(text, blocks=False, **fields):
    begin, end = BLOCKS if blocks else PLAIN
    return Template(TOK, text.replace("ENDGENERATION %}", end).replace("GENERATION %}", begin), **fields)


def learned(ids, weights):
    """The stretches that are learned, special tokens spelt out."""
    back = {i: name for name, i in TOK.specials.items()}
    texts, on = [], False
    for i, weight in zip(ids.tolist(), weights, strict=True):
        if weight:
            texts += [] if on else [b""]
            texts[-1] += back[i].encode() if i in back else TOK.decode_bytes([i])
        on = bool(weight)
    return [text.decode() for text in texts]


@pytest.mark.parametrize("blocks", [True, False], ids=["generation blocks", "prefixes"])
def test_what_is_learned_is_what_the_assistant_wrote_its_end_of_turn_included(blocks):
    arguments = '{"city": "K\u00f8benhavn <|im_end|>", "n": [1, 2]}'
    call = f'<tool_call>\n{{"name": "weather", "arguments": {arguments}}}\n</tool_call>'
    ids, weights = template(CHATML, blocks).encode(WITH_TOOLS, TOOLS)
    turns = ["I am a machine, and you?", "Nice.", f"Let me see.\n{call}\n{call}", "Both."]
    assert learned(ids, weights) == [f"{text}<|im_end|>" for text in turns]
    unlearned = [{**m, "weight": 0} if m["content"] == "Nice." else m for m in WITH_TOOLS]
    fewer = template(CHATML, blocks).encode(unlearned, TOOLS)
    assert fewer[0].tolist() == ids.tolist()
    assert learned(*fewer) == [f"{text}<|im_end|>" for text in turns if text != "Nice."]
    for text, talk, end in ((LLAMA, SYSTEM, "<|eot_id|>"), (GEMMA, SIMPLE, "<end_of_turn>")):
        said = [m["content"] + end for m in talk if m["role"] == "assistant"]
        assert learned(*template(text, blocks).encode(talk)) == said
    said = [f" {m['content']}</s>" for m in SIMPLE if m["role"] == "assistant"]
    assert learned(*template(MISTRAL, blocks).encode(SIMPLE)) == said


@pytest.mark.parametrize("name", EVERY)
def test_blocks_and_prefixes_agree(name):
    text, talk, tools = EVERY[name]
    a, b = (template(text, blocks).encode(talk, tools) for blocks in (True, False))
    assert a[0].tolist() == b[0].tolist() and a[1].tolist() == b[1].tolist()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("blocks", [True, False], ids=["generation blocks", "prefixes"])
def test_what_is_sampled_behind_a_prompt_is_what_is_learned(name, blocks):
    text, talk, tools = EVERY[name]
    made = template(text, blocks)
    ids, weights = made.encode(talk, tools)
    turns = [i for i, m in enumerate(talk) if m["role"] == "assistant"]
    built = made.prompt(talk[: turns[0]], tools)
    for here, following in zip(turns, [*turns[1:], None], strict=True):
        assert ids[: len(built)].tolist() == built
        start = len(built)
        while len(built) < len(ids) and weights[len(built)]:
            built.append(int(ids[len(built)]))
        assert built[-1] == made.stop[0]
        reply = made.parse(built[start:])
        assert reply["content"].strip() == talk[here]["content"]
        assert [(c["name"], json.loads(c["arguments"])) for c in reply.get("tool_calls", ())] == [
            (c["name"], json.loads(c["arguments"])) for c in talk[here].get("tool_calls", ())
        ]
        if following is not None:
            built += made.continuation(talk[: here + 1], talk[here + 1 : following], tools)
    assert ids[: len(built)].tolist() == built
    assert TOK.decode(ids[len(built) :]) in ("", "\n"), "what a template writes behind the last end-of-turn"


@pytest.mark.parametrize("weight", [0, 1])
def test_a_reply_that_begins_with_a_blank_line_leaves_the_prompt_as_it_is(weight):
    """The vocabulary has a token for two line ends, and the assistant's header ends with one."""
    assert len(TOK.encode("\n\n")) == 1
    talk = [*SIMPLE[:1], {"role": "assistant", "content": "\nHello", "weight": weight}, *SIMPLE[2:]]
    for blocks in (True, False):
        made = template(CHATML, blocks)
        prompt = made.prompt(talk[:1])
        assert made.encode(talk)[0][: len(prompt)].tolist() == prompt


@pytest.mark.parametrize("name", EVERY)
def test_text_that_spells_special_tokens_stays_text(name):
    text, talk, tools = EVERY[name]
    made = template(text, blocks=True)
    odd = [{**m, "content": f"{SPELT} \U000f0000\ufdd0 {m['content']}"} for m in talk]
    ids, _ = made.encode(odd, tools)
    special = [i for i in ids.tolist() if i in TOK.specials.values()]
    assert special == [i for i in made.encode(talk, tools)[0].tolist() if i in TOK.specials.values()]
    assert TOK.decode(ids).count(f"{SPELT} \U000f0000\ufdd0 ") == len(talk)


@pytest.mark.parametrize("name", EVERY)
def test_ids_and_mask_are_those_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    text, talk, tools = EVERY[name]
    begin, end = BLOCKS
    text = text.replace("ENDGENERATION %}", end).replace("GENERATION %}", begin)
    # transformers lets a spelt token through, so the one in CALL is left out here
    talk = json.loads(json.dumps(talk).replace(" <|im_end|>", ""))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(SPEC), bos_token="<s>", eos_token="</s>"
    )
    as_theirs = [
        {**m, "tool_calls": [
            {"type": "function", "function": {**c, "arguments": json.loads(c["arguments"])}} for c in m["tool_calls"]
        ]} if "tool_calls" in m else m for m in talk
    ]  # fmt: skip
    options = {"chat_template": text, "tools": list(tools) or None, "tokenize": True, "return_dict": True}
    expected = theirs.apply_chat_template(as_theirs, return_assistant_tokens_mask=True, **options)
    ids, weights = Template(TOK, text).encode(talk, tools)
    assert ids.tolist() == expected["input_ids"]
    assert weights.tolist() == expected["assistant_masks"]
    asked = theirs.apply_chat_template(as_theirs[:-1], add_generation_prompt=True, **options)
    assert Template(TOK, text).prompt(talk[:-1], tools) == asked["input_ids"]


# -------------------------------------------------------------------------------------------------- what is refused


def test_a_template_that_rewrites_earlier_turns_cannot_go_on():
    made = template(FORGETFUL)
    assert made.stop == (TOK.end,)
    thought = {"role": "assistant", "content": "<think>hm</think>yes"}
    with pytest.raises(LmtrainError, match=r"once messages follow, it writes 'yes.* where it wrote '<think>hm"):
        made.continuation([SIMPLE[0], thought], [SIMPLE[2]])
    plain = [SIMPLE[0], {"role": "assistant", "content": "yes"}]
    assert TOK.decode(made.continuation(plain, [SIMPLE[2]])) == f"U: {SIMPLE[2]['content']}\nA: "
    with pytest.raises(Unusable, match=r"changes with what follows; put \{% generation %\}"):
        made.encode([SIMPLE[0], thought, *SIMPLE[2:]])
    assert learned(*made.encode([SIMPLE[0], thought])) == ["<think>hm</think>yes\n"]


@pytest.mark.parametrize(
    ("talk", "reason", "detail"),
    [
        (SYSTEM, "the template refuses it", "System role not supported"),
        ([SIMPLE[0], *SIMPLE], "the template refuses it", "roles must alternate"),
        ([*SIMPLE[:2], SIMPLE[1]], "the template refuses it", "roles must alternate"),
        ([SIMPLE[0], {"role": "bot", "content": "x"}], "unknown role", "'bot'"),
        ([SIMPLE[0], {"role": "assistant", "content": 3}], "content is no text", "int"),
        (SIMPLE[:1], "no assistant turn", "user"),
    ],
)
def test_what_the_template_or_lmtrain_refuses_is_named(talk, reason, detail):
    with pytest.raises(Unusable, match=detail) as error:
        template(GEMMA, blocks=True).encode(talk)
    assert error.value.reason == reason


def test_templates_that_fail_are_named(tmp_path):
    (tmp_path / "cut.jinja").write_text("{% for m in messages %}\n{{ m.content }\n")
    with pytest.raises(LmtrainError, match=r"cut\.jinja:2: not a Jinja template"):
        Template(TOK, str(tmp_path / "cut.jinja"))
    with pytest.raises(LmtrainError, match=r"data\.template: no file .*cut\.jinj\. Did you mean cut\.jinja\?"):
        Template(TOK, str(tmp_path / "cut.jinj"))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(LmtrainError, match=r"tokenizer_config\.json holds no chat_template"):
        Template(TOK, str(tmp_path))
    for text in ("{{ messages[9].content }}", "{{ messages.clear() }}", "{{ 1 / 0 }}", "{{ ''.__class__.mro() }}"):
        with pytest.raises(Unusable, match=r"the template fails on it: data\.template: \w+: "):
            Template(TOK, text).encode(SIMPLE)
    two = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    with pytest.raises(Unusable, match="4 generation blocks for 2 assistant turns"):
        Template(TOK, two).encode([*SIMPLE[:3], {**SIMPLE[3], "weight": 0}])


def test_without_jinja2_the_command_for_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(LmtrainError, match=r"needs jinja2 .*pip install -e '\.\[chat\]'"):
        Template(TOK, "{{ messages }}")


# ------------------------------------------------------------------------------------------------------------- the rest


def test_a_folder_as_hugging_face_writes_it(tmp_path):
    text = LLAMA.replace("ENDGENERATION", "endif").replace("GENERATION", "if true").replace("bos_token", "bos_token")
    config = {"bos_token": {"content": "<|im_start|>"}, "chat_template": text}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    first = Template(TOK, str(tmp_path))
    assert first.encode(SIMPLE)[0][0] == TOK.specials["<|im_start|>"], "bos_token is what the configuration says"
    several = [{"name": "rag", "template": "x"}, {"name": "default", "template": text}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": several}))
    assert Template(TOK, str(tmp_path / "tokenizer_config.json")).fingerprint == first.fingerprint
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    other = Template(TOK, str(tmp_path))
    assert other.fingerprint != first.fingerprint
    assert other.prompt(SIMPLE)[0] == TOK.specials["<|im_start|>"]


def test_the_day_is_today_or_the_one_given():
    fixed = template(LLAMA, today=datetime.date(2024, 7, 26))
    assert "Today is 26 Jul 2024.\n" in TOK.decode(fixed.prompt(SYSTEM[:2]))
    today = datetime.date.today()
    now = TOK.decode(template(LLAMA).prompt(SYSTEM[:2]))
    assert any(f"Today is {day:%d %b %Y}." in now for day in (today, datetime.date.today()))


def test_special_tokens_that_swallow_blanks_do_so():
    spec = json.loads(SPEC)
    for token in spec["added_tokens"]:
        token["rstrip"] = token["content"] == "<|im_end|>"
        token["lstrip"] = token["content"] == "<|im_start|>"
    tok = tokenizer.Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(spec)))
    made = Template(tok, CHATML.replace("ENDGENERATION", "endif").replace("GENERATION", "if true"))
    back = {i: name for name, i in TOK.specials.items()}
    text = "".join(back.get(i) or TOK.decode([i]) for i in template(CHATML).encode(LATIN)[0].tolist())
    theirs = tokenizers.Tokenizer.from_str(json.dumps(spec))
    assert made.encode(LATIN)[0].tolist() == theirs.encode(text, add_special_tokens=False).ids
    assert made.encode(LATIN)[0].tolist() != template(CHATML).encode(LATIN)[0].tolist()


def test_the_head_is_the_system_message_or_the_beginning():
    made = template(LLAMA)
    ids, _ = made.encode(SYSTEM)
    head = made.head(SYSTEM, ids)
    assert ids[head - 1] == TOK.specials["<|eot_id|>"] and TOK.decode(ids[:head]).endswith("Be brief.")
    assert made.head(SIMPLE, made.encode(SIMPLE)[0]) == 1
    assert template(GEMMA).head(SYSTEM, ids) == 0, "a template that takes no system message"


def test_a_reply_that_is_one_json_call_is_a_call():
    made = template(CHATML)
    for text, arguments in (
        ('{"name": "f", "parameters": {"a": 1}}', '{"a": 1}'),
        ('{"name":"f","arguments":"x"}', "x"),
    ):
        reply = made.parse(TOK.encode(text))
        assert reply == {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": arguments}]}
    for text in ('{"name": "f"}', '{"city": 1}', "<tool_call>\n{broken}\n</tool_call>", "[" * 5000):
        assert made.parse(TOK.encode(text)) == {"role": "assistant", "content": text}
