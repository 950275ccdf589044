"""Forty lines for each of OpenAI's three fine-tuning formats: good ones, and bad ones with what must be said of them.

A line is an object, or bytes where it is no JSON of one. A good line gets a mark, <<NUMBER>>, in its last question,
so that what a model was trained on can be told line by line.
"""

import json

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"type": "string", "enum": ["C", "F"]}},
            "required": ["city"],
        },
    },
}
TIME = {"type": "function", "function": {"name": "local_time"}}


def user(text="Hi", **more):
    return {"role": "user", "content": text, **more}


def assistant(text="Hello.", **more):
    return {"role": "assistant", "content": text, **more}


def call(name="weather", arguments='{"city": "Oslo"}', id="call_1"):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls, **more):
    return {"role": "assistant", "tool_calls": list(calls), **more}


def result(text="dry", id="call_1"):
    return {"role": "tool", "tool_call_id": id, "content": text}


def said(*messages, **more):
    return {"messages": list(messages), **more}


def tool(**function):
    return said(user(), assistant(), tools=[{"type": "function", "function": {"name": "f", **function}}])


def text(row):
    return json.dumps(row).encode()


# ----------------------------------------------------------------------------------------------------------- supervised
SUPERVISED_GOOD = [
    said(user(), assistant()),
    said({"role": "system", "content": "Be brief."}, user(), assistant()),
    said({"role": "developer", "content": "Be brief."}, user(name="tim"), assistant(name="bot")),
    said(user(), assistant("A", weight=0), user("More"), assistant("B", weight=1)),
    said(
        user([{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]),
        assistant([{"type": "text", "text": "Yo"}]),
    ),
    said(user(), calling(call()), tools=[WEATHER], parallel_tool_calls=False),
    said(
        user(),
        calling(call(), call("local_time", "{}", "call_2"), content=None),
        result("9:15", "call_2"),
        result("wet"),
        assistant("Wet, 9:15."),
        tools=[WEATHER, TIME],
    ),
    said(
        user(),
        {"role": "assistant", "function_call": {"name": "weather", "arguments": "{}"}},
        {"role": "function", "name": "weather", "content": "dry"},
        assistant("Dry."),
        functions=[WEATHER["function"]],
    ),
    said(user(), {"role": "assistant", "content": None, "refusal": "I will not."}),
    said(assistant("Welcome!"), user(), user("Still there?"), assistant("Yes."), tools=[]),
    said(user(), assistant("Ünïcödé 😀 <|end|>"), parallel_tool_calls=True),
    said(user(), calling(call()), {**result(""), "name": "weather"}, assistant("No idea."), tools=[WEATHER]),
]
SUPERVISED_BAD = [
    # line, reason, what else is said
    (b"", "blank line", "JSON object was expected"),
    (b'{"messages": [', "not JSON", "Expecting value at character 15"),
    (b'[{"role": "user"}]', "a line is no object", "a list"),
    (b"\xef\xbb\xbf" + text(said(user(), assistant())), "byte order mark", "UTF-8 without it"),
    (b'{"messages": "\xff"}', "not UTF-8", "0xff"),
    (b'{"messages": [], "messages": []}', "a key twice", "'messages'"),
    (text(said(user(), assistant(weight=float("nan")))), "no number of JSON's", "NaN"),
    (b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', "half a character", "\\ud83d"),
    (said(user(), assistant(), mesages=1), "unknown field", "Did you mean messages?"),
    ({"prompt": "Hi", "completion": "Hello."}, "another format", "completions"),
    (said(), "no messages", "an empty list"),
    (said("Hi", assistant()), "a message is no object", "messages[0] is text"),
    (said(user(), {"role": "assistent", "content": "Hello."}), "unknown role", "Did you mean assistant?"),
    (said({"role": "user"}, assistant()), "missing field", "messages[0] has no content"),
    (said(user("  "), assistant()), "empty content", "messages[0] (user)"),
    (said(user({"text": "Hi"}), assistant()), "content is no text", "messages[0].content is an object"),
    (said(user(), assistant(), user("Bye")), "the last message is not the assistant's", "user's"),
    (said(user(), assistant(weight=2)), "unusable weight", "messages[1].weight is 2, takes 0 or 1"),
    (said(user(), assistant(weight=0)), "nothing to learn", "weight 0"),
    (said(user(), calling(call())), "a call without tools", "defines no tools"),
    (said(user(), calling(call("wether")), tools=[WEATHER]), "unknown tool", "Did you mean weather?"),
    (said(user(), calling(call(arguments="{city: 1}")), tools=[WEATHER]), "unusable arguments", "not JSON"),
    (
        said(user(), calling(call()), result(id="call_2"), assistant(), tools=[WEATHER]),
        "a result without a call",
        "call_1",
    ),
    (
        said(user(), calling(call()), user("And?"), assistant(), tools=[WEATHER]),
        "a call without a result",
        "messages[2]",
    ),
    (said(user(), assistant(), tools=[WEATHER, WEATHER]), "a tool twice", "'weather'"),
    (tool(parameters={"type": "string"}), "parameters are no JSON schema", "'object'"),
    (said(user(), assistant(), parallel_tool_calls="yes"), "wrong type", "parallel_tool_calls is 'yes'"),
    (
        said(user(), {"role": "system", "content": "Late."}, assistant()),
        "a system message that is not the first",
        "[1]",
    ),
]

#: Further lines that no supervised file may have: the same kinds of slips in other places.
SUPERVISED_MORE = [
    (b"{'messages': []}", "not JSON", "double quotes"),
    (b"{", "not JSON", "one line"),
    (text(said(user(), assistant())) * 2, "not JSON", "Extra data"),
    (b'"Hi"', "a line is no object", "text"),
    (b"null", "a line is no object", "null"),
    (b'{"messages": 1e999}', "no number of JSON's", "too large"),
    (b'{"messages": ' + b"1" * 5000 + b"}", "no number of JSON's", "digits"),
    (b"[" * 100_000, "JSON nested too deeply to be read", ""),
    (b'{"messages": ' + b"[" * 900 + b"]" * 900 + b"}", "a message is no object", "a list"),
    ("{}".encode("utf-16"), "not UTF-8", "0xff"),
    ({}, "missing field", "has no messages"),
    ({"messages": None}, "missing field", "has no messages"),
    ({"messages": {"role": "user"}}, "no messages", "an object"),
    ({"input": {}, "preferred_output": []}, "another format", "preference"),
    ({"conversations": []}, "another format", "ShareGPT"),
    ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, "another format", "preference"),
    (said(user(), assistant(), reference="7"), "unknown field", "reference"),
    (said(user(), assistant("Hi", content_type="x")), "unknown field", "messages[1].content_type"),
    (said(user(), assistant(wieght=1)), "unknown field", "Did you mean weight?"),
    (said({"rol": "user", "content": "Hi"}, assistant()), "missing field", "Did you mean rol?"),
    (said({"role": 3, "content": "Hi"}, assistant()), "unknown role", "3"),
    (said({"role": ["user"], "content": "Hi"}, assistant()), "unknown role", "user"),
    (said(user(), {"role": "assistant"}), "missing field", "calls no tool"),
    (said(user(), assistant(None)), "missing field", "has no content"),
    (said(user(), assistant("")), "empty content", "messages[1]"),
    (said({"role": "system", "content": ""}, user(), assistant()), "empty content", "system"),
    (said(user([]), assistant()), "empty content", "messages[0]"),
    (said(user(7), assistant()), "content is no text", "a number"),
    (said(user(True), assistant()), "content is no text", "true or false"),
    (said(user(["Hi"]), assistant()), "content is no text", "messages[0].content[0] is text"),
    (said(user([{"type": "txt", "text": "Hi"}]), assistant()), "content is no text", "Did you mean text?"),
    (said(user([{"type": "text", "text": 1}]), assistant()), "content is no text", "content[0].text is a number"),
    (said(user([{"type": "text"}]), assistant()), "missing field", "content[0] has no text"),
    (said(user([{"type": "image_url", "image_url": {"url": "x"}}]), assistant()), "content is no text", "image_url"),
    (said(user(), assistant([{"type": "refusal", "refusal": "no", "x": 1}])), "unknown field", "content[0].x"),
    (said(user(), {"role": "assistant", "content": None, "audio": {"id": "1"}}), "content is no text", "audio"),
    (said(user(), assistant("Yes", refusal="No")), "wrong type", "refusal"),
    (said(user(), assistant("", refusal="")), "wrong type", "empty"),
    (said(user(name="a b"), assistant()), "wrong type", "name"),
    (said(user(name=3), assistant()), "wrong type", "name"),
    (said(user(weight=1), assistant()), "unusable weight", "only an assistant's"),
    (said({"role": "system", "content": "x", "weight": 0}, user(), assistant()), "unusable weight", "system"),
    (said(user(), assistant(weight=True)), "unusable weight", "True"),
    (said(user(), assistant(weight="1")), "unusable weight", "'1'"),
    (said(user(), assistant(weight=0.5)), "unusable weight", "0.5"),
    (said(user()), "no assistant message", "user"),
    (said(assistant()), "no user message", "assistant"),
    (said(user(), assistant(), {"role": "system", "content": "x"}), "a system message that is not the first", "[2]"),
    (
        said({"role": "system", "content": "x"}, {"role": "developer", "content": "y"}, user(), assistant()),
        "a system message that is not the first",
        "[1]",
    ),
    (said(user(), assistant("A"), assistant("B")), "two assistant messages in a row", "make them one"),
    (said(user(), result(), assistant()), "a result without a call", "none"),
    (said(user(), calling(call()), result(), result(), assistant(), tools=[WEATHER]), "a result twice", "call_1"),
    (
        said(user(), calling(call(), call(id="call_2")), result(), assistant(), tools=[WEATHER]),
        "a call without a result",
        "call_2",
    ),
    (said(user(), calling(call(), call()), tools=[WEATHER]), "an id twice", "call_1"),
    (
        said(user(), calling(call(), call(id="call_2")), tools=[WEATHER], parallel_tool_calls=False),
        "calls in parallel",
        "2",
    ),
    (said(user(), calling(), tools=[WEATHER]), "unusable tool call", "an empty list"),
    (said(user(), {"role": "assistant", "tool_calls": {}}, tools=[WEATHER]), "unusable tool call", "an object"),
    (said(user(tool_calls=[call()]), assistant(), tools=[WEATHER]), "unusable tool call", "user"),
    (said(user(), calling({**call(), "type": "retrieval"}), tools=[WEATHER]), "unusable tool call", "retrieval"),
    (said(user(), calling({"type": "function", "function": {}}), tools=[WEATHER]), "missing field", "has no id"),
    (said(user(), calling({**call(), "index": 0}), tools=[WEATHER]), "unknown field", "index"),
    (said(user(), calling(call(id="")), tools=[WEATHER]), "wrong type", "id is empty"),
    (said(user(), calling(call(arguments={"city": "Oslo"})), tools=[WEATHER]), "unusable arguments", "an object"),
    (said(user(), calling(call(arguments="[1]")), tools=[WEATHER]), "unusable arguments", "a list"),
    (said(user(), calling(call(arguments="")), tools=[WEATHER]), "unusable arguments", "not JSON"),
    (said(user(), calling(call(arguments='{"a": 1, "a": 2}')), tools=[WEATHER]), "unusable arguments", "a key twice"),
    (
        said(user(), calling(call()), {"role": "tool", "content": "dry"}, assistant(), tools=[WEATHER]),
        "missing field",
        "tool_call_id",
    ),
    (
        said(user(), {"role": "assistant", "function_call": {"name": "weather", "arguments": "{}"}}, tools=[WEATHER]),
        "a call without tools",
        "functions",
    ),
    (
        said(
            user(),
            {"role": "assistant", "function_call": {"name": "weather", "arguments": "{}"}, "tool_calls": [call()]},
            tools=[WEATHER],
        ),
        "unusable tool call",
        "older form",
    ),
    (
        said(
            user(),
            {"role": "assistant", "function_call": {"name": "weather", "arguments": "{}"}},
            {"role": "function", "name": "time", "content": "x"},
            assistant(),
            functions=[WEATHER["function"]],
        ),
        "a result without a call",
        "weather",
    ),
    (said(user(), assistant(), tools=[WEATHER], functions=[WEATHER["function"]]), "unusable tool", "older form"),
    (said(user(), assistant(), tools=WEATHER), "wrong type", "tools is an object"),
    (said(user(), assistant(), tools=["weather"]), "wrong type", "tools[0] is text"),
    (said(user(), assistant(), tools=[WEATHER["function"]]), "unknown field", "tools[0].name"),
    (
        said(user(), assistant(), tools=[{"type": "function", "function": {"description": "x"}}]),
        "missing field",
        "has no name",
    ),
    (said(user(), assistant(), tools=[{**WEATHER, "type": "web"}]), "unusable tool", "'web'"),
    (said(user(), assistant(), functions=[{"name": "a b"}]), "unusable tool", "'a b'"),
    (tool(description=3), "wrong type", "description"),
    (tool(strict="yes"), "wrong type", "strict"),
    (tool(paramters={}), "unknown field", "Did you mean parameters?"),
    (tool(parameters=[]), "parameters are no JSON schema", "a list"),
    (tool(parameters="{}"), "parameters are no JSON schema", "text"),
    (tool(parameters={"properties": {}}), "parameters are no JSON schema", "None"),
    (tool(parameters={"type": "object", "properties": []}), "parameters are no JSON schema", "properties is a list"),
    (
        tool(parameters={"type": "object", "properties": {"a": {"type": "text"}}}),
        "parameters are no JSON schema",
        "'text'",
    ),
    (tool(parameters={"type": "object", "required": "a"}), "parameters are no JSON schema", "required"),
    (tool(parameters={"type": "object", "properties": {"a": {"enum": []}}}), "parameters are no JSON schema", "enum"),
    (tool(parameters={"type": "object", "properties": {"a": {"items": 1}}}), "parameters are no JSON schema", "items"),
    (tool(parameters={"type": "object", "properties": {"a": {"anyOf": {}}}}), "parameters are no JSON schema", "anyOf"),
    (said(user(), assistant(), parallel_tool_calls=1), "wrong type", "parallel_tool_calls is 1"),
]


# ----------------------------------------------------------------------------------------------------------- preference
def pair(*messages, good="Yes.", bad="No!", **more):
    given = dict(zip(("preferred_output", "non_preferred_output"), map(outputs, (good, bad)), strict=True))
    return {"input": {"messages": list(messages) or [user()]}, **given, **more}


def outputs(given):
    return [assistant(given)] if isinstance(given, str) else given


def asked(more, **rest):
    """A pair whose input has further fields."""
    row = pair(**rest)
    row["input"] |= more
    return row


PREFERENCE_GOOD = [
    pair(),
    pair({"role": "system", "content": "Be kind."}, user()),
    pair(user("A"), assistant("B"), user("C")),
    pair(user("A"), assistant("B", weight=0), user("C")),
    pair(user([{"type": "text", "text": "Hi"}])),
    pair(good=[assistant([{"type": "text", "text": "Yes."}])]),
    asked({"tools": [], "parallel_tool_calls": True}),
    asked({"tools": [WEATHER]}, good=[calling(call())]),
    asked(
        {"tools": [WEATHER]}, good=[calling(call(arguments='{"city": "Oslo"}'))], bad=[calling(call(arguments="{}"))]
    ),
    pair(bad=[{"role": "assistant", "refusal": "No."}]),
    pair(good=[assistant("Yes.", name="bot")]),
    {
        **pair(user(), calling(call()), result(), good="Dry."),
        "input": {"messages": [user(), calling(call()), result()], "tools": [WEATHER]},
    },
]
PREFERENCE_BAD = [
    (b"   ", "blank line", ""),
    (b"{]", "not JSON", "Expecting property name"),
    (b"7", "a line is no object", "a number"),
    (b"\xef\xbb\xbf{}", "byte order mark", ""),
    (b'{"input": "\xc3("}', "not UTF-8", "0xc3"),
    (b'{"input": {"messages": [], "messages": []}}', "a key twice", "messages"),
    (b'{"input": Infinity}', "no number of JSON's", "Infinity"),
    (b'{"input": "\\udc00"}', "half a character", "udc00"),
    (said(user(), assistant()), "another format", "messages stand in input"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "another format", "chosen, rejected"),
    (pair(margin=1), "unknown field", "margin"),
    ({k: v for k, v in pair().items() if k != "non_preferred_output"}, "missing field", "non_preferred_output"),
    ({**pair(), "input": [user()]}, "wrong type", "input is a list"),
    (asked({"messages": []}), "no messages", "input.messages is an empty list"),
    (pair("Hi"), "a message is no object", "input.messages[0]"),
    (pair(user(), {"role": "bot", "content": "x"}), "unknown role", "'bot'"),
    (pair({"role": "user"}), "missing field", "input.messages[0] has no content"),
    (pair(user("")), "empty content", "input.messages[0]"),
    (pair(user(3)), "content is no text", "a number"),
    (pair(user(), assistant()), "the last message is not a user's", "assistant's"),
    (pair(good=[]), "an output that is not one message", "preferred_output is a list of 0"),
    (pair(bad=[user("No")]), "an output that is not the assistant's", "non_preferred_output[0].role is user"),
    (pair(good=[assistant(weight=1)]), "unusable weight", "preferred_output[0]"),
    (pair(good="Same.", bad=[assistant([{"type": "text", "text": "Same."}])]), "the two outputs are the same", ""),
    (pair(good=[calling(call())]), "a call without tools", "preferred_output[0].tool_calls[0]"),
    (asked({"tools": [TIME]}, good=[calling(call())]), "unknown tool", "local_time"),
    (pair(user(), {"role": "system", "content": "x"}, user()), "a system message that is not the first", ""),
    (asked({"tools": [WEATHER, WEATHER]}), "a tool twice", "input.tools"),
]
PREFERENCE_MORE = [
    (asked({"functions": []}), "unknown field", "input.functions"),
    (asked({"paralel_tool_calls": True}), "unknown field", "Did you mean parallel_tool_calls?"),
    (asked({"parallel_tool_calls": "true"}), "wrong type", "input.parallel_tool_calls"),
    (asked({"tools": [{"type": "function"}]}), "missing field", "input.tools[0] has no function"),
    (
        asked({"tools": [{"type": "function", "function": {"name": "f", "parameters": 1}}]}),
        "parameters are no JSON schema",
        "",
    ),
    (pair(prefered_output=[]), "unknown field", "Did you mean preferred_output?"),
    ({**pair(), "preferred_output": assistant()}, "an output that is not one message", "an object"),
    ({**pair(), "preferred_output": "Yes."}, "an output that is not one message", "text"),
    ({**pair(), "preferred_output": None}, "missing field", "preferred_output"),
    (pair(good=[assistant("A"), assistant("B")]), "an output that is not one message", "2"),
    (pair(good=[assistant("A"), user("B")]), "an output that is not one message", "2"),
    (pair(bad=[{"role": "assistant"}]), "missing field", "non_preferred_output[0] has no content"),
    (pair(bad=[assistant(" ")]), "empty content", "non_preferred_output[0]"),
    (pair(bad=["No"]), "a message is no object", "non_preferred_output[0]"),
    (pair(good="A", bad="A"), "the two outputs are the same", "teaches nothing"),
    (pair({"role": "system", "content": "x"}), "the last message is not a user's", "system"),
    (pair(user(), result()), "a result without a call", ""),
    (asked({"tools": [WEATHER], "messages": [user(), calling(call()), result(), result()]}), "a result twice", ""),
    (
        asked({"tools": [WEATHER], "messages": [user(), calling(call(), call(id="b")), result()]}),
        "a call without a result",
        "'b'",
    ),
    (asked({"tools": [WEATHER], "messages": [user(), calling(call())]}), "the last message is not a user's", ""),
    (
        asked({"tools": [WEATHER], "parallel_tool_calls": False}, good=[calling(call(), call(id="b"))]),
        "calls in parallel",
        "",
    ),
    (asked({"tools": [WEATHER]}, good=[calling(call(arguments="x"))]), "unusable arguments", "preferred_output[0]"),
    (pair(user(weight=0)), "unusable weight", "input.messages[0]"),
    (pair(user("A"), assistant("B", weight=3), user("C")), "unusable weight", "3"),
]


# -------------------------------------------------------------------------------------------------------- reinforcement
#: Reads item.answer, item.more.hint and the sample.
GRADER = {
    "type": "multi",
    "graders": {
        "right": {
            "type": "string_check",
            "input": "{{sample.output_text}}",
            "reference": "{{item.answer}}",
            "operation": "like",
        },
        "near": {
            "type": "text_similarity",
            "input": "{{ sample.output_text }}",
            "reference": "{{ item.more.hints[0] }}",
            "evaluation_metric": "fuzzy_match",
        },
    },
    "calculate_output": "0.5 * right + 0.5 * near",
}


def ask(*messages, **more):
    return {"messages": list(messages) or [user()], "answer": "a", "more": {"hints": ["e"]}, **more}


def without(name):
    return {key: value for key, value in ask().items() if key != name}


REINFORCEMENT_GOOD = [
    ask(),
    ask({"role": "system", "content": "Be brief."}, user()),
    ask({"role": "developer", "content": "Be brief."}, user(name="tim")),
    ask(user("A"), assistant("B"), user("C")),
    ask(user("A"), assistant("B", weight=0), user("C")),
    ask(user([{"type": "text", "text": "Hi"}])),
    ask(tools=[WEATHER]),
    ask(tools=[]),
    ask(answer=7),
    ask(answer=["a", 1], more={"hints": ["e", "f"], "other": None}),
    ask(user(), calling(call()), result(), assistant("Dry."), user("Sure?"), tools=[WEATHER]),
    ask(unused={"any": [1, 2.5, True, None]}, ids=[1]),
]
REINFORCEMENT_BAD = [
    (b"\t", "blank line", ""),
    (b'{"messages": [}', "not JSON", "Expecting value"),
    (b"[]", "a line is no object", "a list"),
    (b"\xef\xbb\xbf" + text(ask()), "byte order mark", ""),
    (b'{"answer": "\x80"}', "not UTF-8", "0x80"),
    (text(ask())[:-1] + b', "answer": "b"}', "a key twice", "'answer'"),
    (text(ask(score=float("-inf"))), "no number of JSON's", "-Infinity"),
    (text(ask(answer="X")).replace(b'"X"', b'"\\udfff"'), "half a character", "udfff"),
    ({"mesages": [user()], "answer": "a"}, "missing field", "Did you mean mesages?"),
    (pair(), "another format", "preference"),
    (ask(answer=None), "no field for the grader", "item.answer is null"),
    (without("answer"), "no field for the grader", "item has no answer"),
    (ask(more={"hint": "e"}), "no field for the grader", "item.more has no hints: it has hint. Did you mean hint?"),
    (ask(more={"hints": []}), "no field for the grader", "item.more.hints has no [0]"),
    ({**ask(), "messages": []}, "no messages", "an empty list"),
    (ask("Hi"), "a message is no object", "text"),
    (ask({"role": "usr", "content": "Hi"}), "unknown role", "Did you mean user?"),
    (ask({"role": "user"}), "missing field", "messages[0] has no content"),
    (ask(user(" ")), "empty content", "messages[0]"),
    (ask(user(None)), "missing field", "content"),
    (ask(user([{"type": "input_audio", "input_audio": {}}])), "content is no text", "input_audio"),
    (ask(user(), assistant()), "the last message is not a user's", "assistant's"),
    (ask({"role": "system", "content": "Be brief."}), "the last message is not a user's", "system's"),
    (ask(user(weight=1)), "unusable weight", "messages[0]"),
    (ask(user(), {"role": "system", "content": "x"}, user()), "a system message that is not the first", ""),
    (ask(user(text_="x")), "unknown field", "messages[0].text_"),
    (ask(tools=[WEATHER, WEATHER]), "a tool twice", "weather"),
    (ask(user(), calling(call()), user("Well?"), tools=[WEATHER]), "a call without a result", "call_1"),
]
REINFORCEMENT_MORE = [
    ({"prompt": "Hi", "answer": "a"}, "missing field", "has no messages"),
    (ask(more=["e"]), "no field for the grader", "item.more"),
    (ask(more={"hints": "e"}), "no field for the grader", "item.more.hints"),
    (ask(more={"hints": [None]}), "no field for the grader", "null"),
    (ask(tools={}), "wrong type", "tools is an object"),
    (
        ask(tools=[{"type": "function", "function": {"name": "f", "parameters": []}}]),
        "parameters are no JSON schema",
        "",
    ),
    (ask(user(), calling(call()), result(), user("Well?")), "a call without tools", ""),
    (ask(user(), assistant("A"), assistant("B"), user()), "two assistant messages in a row", ""),
    (ask(user(), assistant(), result()), "a result without a call", ""),
    (ask(user(), calling(call()), result(), tools=[WEATHER]), "the last message is not a user's", "tool's"),
    (ask(user(), assistant("A", weight=7), user()), "unusable weight", "7"),
    ({**ask(), "messages": "Hi"}, "no messages", "text"),
    ({**ask(), "messages": None}, "no messages", "null"),
]

FORMATS = {
    "supervised": (SUPERVISED_GOOD, SUPERVISED_BAD, SUPERVISED_MORE),
    "preference": (PREFERENCE_GOOD, PREFERENCE_BAD, PREFERENCE_MORE),
    "reinforcement": (REINFORCEMENT_GOOD, REINFORCEMENT_BAD, REINFORCEMENT_MORE),
}


def marked(row, mark):
    """A good line whose last question ends with a mark."""
    row = json.loads(json.dumps(row))
    messages = (row["input"] if "input" in row else row)["messages"]
    question = [m for m in messages if m["role"] == "user"][-1]
    if isinstance(question["content"], list):
        question["content"].append({"type": "text", "text": mark})
    else:
        question["content"] += mark
    return row


def forty(kind):
    """(the file's bytes, {line number: mark} of the good, {line number: (reason, detail)} of the bad)."""
    good, bad, _ = FORMATS[kind]
    assert len(good) == 12 and len(bad) == 28
    out, marks, faults = [], {}, {}
    for number in range(1, 41):
        if number % 10 in (2, 5, 8) and len(marks) < len(good):
            marks[number] = f" <<{number}>>"
            out.append(text(marked(good[len(marks) - 1], marks[number])))
        else:
            line, *fault = bad[len(faults)]
            faults[number] = tuple(fault)
            out.append(line if isinstance(line, bytes) else text(line))
    return b"\n".join(out) + b"\n", marks, faults
