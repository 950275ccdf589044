import collections
import json

import numpy as np
import pytest

from lmtrain.data import conversations, pipeline, tokenizer
from lmtrain.data.chat import Template
from lmtrain.schema import ConfigError, Data
from lmtrain.types import LmtrainError

TOK = tokenizer.bytes_tokenizer()
NAMES = {i: name for name, i in TOK.specials.items()}
T, B = 128, 4


def write(path, items, **fields):
    path.write_text("".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in items))
    return Data(**{"source": "jsonl", "path": str(path), "row_length": T, "heldout_fraction": 0.2, "heldout_rows": 0,
                   **fields})  # fmt: skip


def talk(i):
    """A conversation of one to three turns, of other lengths each."""
    turns = [
        [{"role": "user", "content": f"q{i}.{k} " + "?" * (i % 7)},
         {"role": "assistant", "content": f"r{i}.{k} " + "!" * (i % 11), "weight": int(k % 2 == 0)}]
        for k in range(i % 3 + 1)
    ]  # fmt: skip
    return {"messages": sum(turns, [])}


def build(kind, data, batch_size=B, seed=0, share=(0, 1)):
    return conversations.build(kind, data, TOK, batch_size, seed, share, progress=False)


def every(table):
    """All rows of a table as one batch."""
    return table.batch([(m, row) for m, rows in enumerate(table.rows) for row in range(rows)])


def segments(batch):
    """Of every segment of a batch: (ids, weights, position of its first token, the batch's other columns there)."""
    found = []
    for b in range(len(batch["tokens_BT"])):
        for s in range(1, batch["segments_BT"][b].max() + 1):
            (at,) = np.nonzero(batch["segments_BT"][b] == s)
            assert (np.diff(at) == 1).all(), "a segment is one stretch"
            found.append({name: array[b, at] for name, array in batch.items()})
    return found


def said(ids):
    return "".join(NAMES.get(i) or TOK.decode([i]) for i in ids)


def check_layout(batch):
    """What holds for every kind of row: no target crosses a border, padding is empty, positions restart."""
    real = batch["segments_BT"] > 0
    assert not batch["weights_BT"][~real].any() and not batch["positions_BT"][~real].any()
    assert (batch["tokens_BT"][~real] == TOK.pad).all()
    for s in segments(batch):
        n = len(s["tokens_BT"])
        assert s["positions_BT"].tolist() == list(range(n))
        assert s["targets_BT"].tolist() == [*s["tokens_BT"][1:].tolist(), TOK.pad]
        assert s["weights_BT"][-1] == 0
    for name, array in batch.items():
        assert array.dtype == (np.int32 if name[:4] in ("toke", "targ", "segm", "posi") else np.float32), name


# ----------------------------------------------------------------------------------------------------------------- chat


@pytest.mark.parametrize("packed", [True, False])
def test_every_conversation_is_there_once_and_learned_as_the_template_says(tmp_path, packed):
    data = write(tmp_path / "c.jsonl", [talk(i) for i in range(200)], pack=packed)
    source, heldout = build("chat", data)
    template = Template(TOK)
    expected = []
    for i in range(200):
        ids, weights = template.encode(talk(i)["messages"])
        expected.append((ids.tolist(), [*weights[1:].tolist(), 0.0]))
    batches = [every(source.table), every(heldout.table)]
    found = []
    for batch in batches:
        check_layout(batch)
        found += [(s["tokens_BT"].tolist(), s["weights_BT"].tolist()) for s in segments(batch)]
    assert sorted(found) == sorted(expected)
    per_row = [int(row.max()) for row in batches[0]["segments_BT"]]
    assert min(per_row) >= 1 and (max(per_row) > 1) == packed
    if packed:
        assert source.tokens / (source.rows * T) > 0.9, "rows are full"


def test_packing_is_the_same_for_any_epoch_process_and_run(tmp_path):
    data = write(tmp_path / "c.jsonl", [talk(i) for i in range(150)])
    first, second = build("chat", data)[0], build("chat", data)[0]
    assert first.state() == second.state() and first.summary() == second.summary()
    rows = first.rows
    epochs = [[first.next()["tokens_BT"] for _ in range(rows)] for _ in range(1)]
    seen = np.concatenate(epochs[0])[: rows * (len(epochs[0]) * B // rows)]
    count = collections.Counter(row.tobytes() for row in seen)
    assert set(count.values()) == {len(seen) // rows} and len(count) == rows, "every row once an epoch"
    assert first.epochs == pytest.approx(rows * B / rows)


def test_restored_on_another_number_of_processes_no_row_is_lost_or_repeated(tmp_path):
    data = write(tmp_path / "c.jsonl", [talk(i) for i in range(300)])
    (whole, _) = build("chat", data, batch_size=8)
    expected = [whole.next() for _ in range(12)]
    for first, second in ((2, 4), (4, 1), (1, 8)):
        pipes = [build("chat", data, 8, 0, (p, first))[0] for p in range(first)]
        got = [[pipe.next() for pipe in pipes] for _ in range(5)]
        state = json.loads(json.dumps(pipes[0].state()))
        pipes = [build("chat", data, 8, 0, (p, second))[0] for p in range(second)]
        for pipe in pipes:
            pipe.restore(state)
        got += [[pipe.next() for pipe in pipes] for _ in range(7)]
        for shares, batch in zip(got, expected, strict=True):
            for name in batch:
                assert (np.concatenate([share[name] for share in shares]) == batch[name]).all()


def test_a_state_of_other_conversations_is_refused_by_name(tmp_path):
    items = [talk(i) for i in range(150)]
    data = write(tmp_path / "c.jsonl", items)
    state = build("chat", data)[0].state()
    bpe = tokenizer.train(["q1 r1 ?? !!" * 9], 280)
    changed = write(tmp_path / "d.jsonl", [talk(i) for i in range(160)])
    fields = {**vars(data)}
    with pytest.raises(LmtrainError, match="checkpoint's corpus is .*another --workdir"):
        build("chat", changed)[0].restore(state)
    for other, name in (
        (Data(**{**fields, "row_length": 256}), "row_length"),
        (Data(**{**fields, "pack": False}), "pack"),
        (Data(**{**fields, "truncate": "left"}), "truncate"),
    ):
        with pytest.raises(LmtrainError, match=f"the checkpoint's {name} is"):
            build("chat", other)[0].restore(state)
    with pytest.raises(LmtrainError, match="the checkpoint's tokenizer is"):
        conversations.build("chat", data, bpe, B, 0, (0, 1), False)[0].restore(state)
    with pytest.raises(LmtrainError, match="the checkpoint's seed is 0, this run's 1"):
        build("chat", data, seed=1)[0].restore(state)
    pytest.importorskip("jinja2")
    text = "{% for m in messages %}{{ '<|user|>' + m.content + '<|end|>' }}{% endfor %}{% if 0 %}{% endif %}"
    text = text.replace("{{", "{% generation %}{{").replace("}}", "}}{% endgeneration %}")
    with pytest.raises(LmtrainError, match="the checkpoint's template is"):
        unweighted = [{"messages": [{**m, "weight": 1} for m in t["messages"]]} for t in items]
        other = write(tmp_path / "e.jsonl", unweighted, template=text)
        build("chat", other)[0].restore(state)


def test_the_held_out_score_counts_the_bytes_that_are_learned(tmp_path):
    items = [{"prompt": f"q{i}", "completion": f"r{i} \u00e9"} for i in range(60)]
    _, heldout = build("chat", write(tmp_path / "c.jsonl", items))
    text = heldout.bytes_text()
    held = [item["completion"] for item in items if item["completion"].encode() in text]
    assert len(held) == 12 and len(text) == sum(len(t.encode()) for t in held) == heldout.bytes
    assert heldout.tokens == heldout.bytes + len(held), "an end-of-turn token each"
    assert sum(batch["weights_BT"].sum() for batch in heldout.batches()) == heldout.tokens
    assert all(batch["tokens_BT"].shape == (B, T) for batch in heldout.batches())


# ---------------------------------------------------------------------------------------------------------------- split


@pytest.mark.parametrize("kind", ["chat", "pairs", "labels"])
@pytest.mark.parametrize("count", [40, 400])
def test_all_rows_of_a_prompt_are_on_one_side(tmp_path, kind, count):
    """By hash from 100 prompts up, else by tail; several replies to each prompt, and further turns."""
    rows = []
    for i in range(count):
        prompt = [{"role": "user", "content": f"prompt {i // 4}"}]
        if i % 2:
            prompt += [{"role": "assistant", "content": "hm"}, {"role": "user", "content": f"more {i}"}]
        replies = [[{"role": "assistant", "content": f"reply {i} {k}"}] for k in range(2)]
        if kind == "chat":
            rows.append({"messages": prompt + replies[0]})
        else:
            rows.append({"prompt": prompt, "chosen": replies[0], "rejected": replies[1]})
    source, heldout = build(kind, write(tmp_path / "c.jsonl", rows))
    sides = []
    for table in (source.table, heldout.table):
        texts = [said(s["tokens_BT"]) for s in segments(every(table))]
        sides.append({text.split("<|user|>")[1].split("<|end|>")[0] for text in texts})
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == count // 4
    assert len(sides[1]) / (count // 4) == pytest.approx(0.2, abs=0.06)


def test_the_same_prompts_are_held_out_whatever_stage_reads_them(tmp_path):
    prompts = [f"prompt {i}" for i in range(300)]
    chat = write(tmp_path / "c.jsonl", [{"question": p, "answer": "x"} for p in prompts])
    replies = [{"prompt": p, "chosen": f"x{p}", "rejected": f"y{p}"} for p in reversed(prompts)]
    pairs = write(tmp_path / "p.jsonl", replies)
    more = Data(**{**vars(chat), "heldout_fraction": 0.4})
    held = []
    for kind, data in (("chat", chat), ("pairs", pairs), ("labels", pairs), ("chat", more)):
        _, heldout = build(kind, data)
        texts = [said(s["tokens_BT"]) for s in segments(every(heldout.table))]
        held.append({text.split("<|user|>")[1].split("<|end|>")[0] for text in texts})
    assert held[0] == held[1] == held[2] < held[3]


def test_duplicates_are_dropped_and_counted_over_all_members(tmp_path):
    items = [{"prompt": f"p{i}", "completion": "c"} for i in range(120)]
    one, two = write(tmp_path / "1.jsonl", items + items[:7]), write(tmp_path / "2.jsonl", items[:50] + [talk(5)] * 3)
    two_more = [{"prompt": f"other {i}", "completion": "c"} for i in range(120)]
    two = write(tmp_path / "2.jsonl", items[:50] + two_more)
    parts = {"a": Data(source="jsonl", path=one.path), "b": Data(source="jsonl", path=two.path, weight=3.0)}
    data = Data(mixture=parts, row_length=T, heldout_fraction=0.2)
    source, heldout = build("chat", data)
    assert "57 duplicates dropped" in source.summary()
    texts = [said(s["tokens_BT"]) for table in (source.table, heldout.table) for s in segments(every(table))]
    assert len(texts) == len(set(texts)) == 240
    assert source.table.names == ["a", "b"] and source.table.weights == [1.0, 3.0]


def test_members_that_split_differently_share_no_prompt(tmp_path):
    """By tail in the small member, by hash in the large one: what either holds out, neither trains on."""
    small = write(tmp_path / "s.jsonl", [{"prompt": f"p{i}", "completion": "s"} for i in range(50)])
    large = write(tmp_path / "l.jsonl", [{"prompt": f"p{i}", "completion": "l"} for i in range(200)])
    data = Data(mixture={n: Data(source="jsonl", path=d.path) for n, d in (("s", small), ("l", large))},
                row_length=T, heldout_fraction=0.2)  # fmt: skip
    source, heldout = build("chat", data)
    sides = [{said(s["tokens_BT"]).split("<|end|>")[0] for s in segments(every(t.table))} for t in (source, heldout)]
    assert not sides[0] & sides[1]
    assert "dropped for a held-out prompt" in source.summary()


def test_a_mixture_of_conversations_honours_its_weights(tmp_path):
    a = write(tmp_path / "a.jsonl", [{"prompt": f"a{i}", "completion": "A" * 80} for i in range(150)])
    b = write(tmp_path / "b.jsonl", [{"question": f"b{i}", "answer": "B" * 80} for i in range(150)])
    parts = {
        "a": Data(source="jsonl", path=a.path, weight=3.0),
        "b": Data(source="jsonl", path=b.path, columns={"prompt": "question"}),
    }
    data = Data(mixture=parts, row_length=T, heldout_fraction=0.2)
    source, _ = build("chat", data)
    texts = [TOK.decode(row) for _ in range(100) for row in source.next()["tokens_BT"]]
    assert sum("A" in text for text in texts) == pytest.approx(300, abs=4)
    shared = Data(**{**vars(data), "mixture": {**parts, "a": Data(source="jsonl", path=a.path, truncate="drop")}})
    with pytest.raises(ConfigError, match=r"data\.mixture\.a\.truncate: one value holds for the whole mixture"):
        build("chat", shared)
    with pytest.raises(ConfigError, match=r"data\.columns: members of a mixture have their own"):
        build("chat", Data(**{**vars(data), "columns": {"prompt": "x"}}))


# ----------------------------------------------------------------------------------------------------------- pairs, kto


@pytest.mark.parametrize("packed", [True, False])
def test_a_pair_is_two_segments_of_one_row(tmp_path, packed):
    items = [
        {"prompt": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "x"},
                    {"role": "user", "content": "and"}],
         "chosen": f"good {i}", "rejected": f"bad {i} " + "." * (i % 9), "margin": i / 4}
        for i in range(120)
    ]  # fmt: skip
    source, heldout = build("pairs", write(tmp_path / "p.jsonl", items, pack=packed))
    numbers = []
    for table in (source.table, heldout.table):
        batch = every(table)
        check_layout(batch)
        found = segments(batch)
        for chosen, rejected in zip(found[::2], found[1::2], strict=True):
            assert chosen["segments_BT"][0] % 2 == 1 and rejected["segments_BT"][0] == chosen["segments_BT"][0] + 1
            i = int(said(chosen["tokens_BT"]).split("<|user|>q")[1].split("<|end|>")[0])
            numbers.append(i)
            for s, reply in ((chosen, f"good {i}"), (rejected, f"bad {i} " + "." * (i % 9))):
                learned = s["targets_BT"][s["weights_BT"] == 1]
                assert said(learned) == f"{reply}<|end|>", "nothing of the prompt, its assistant's turns included"
                assert (s["margins_BT"] == i / 4).all()
        assert not batch["margins_BT"][batch["segments_BT"] == 0].any()
    assert sorted(numbers) == list(range(120))


def test_without_margins_there_is_no_such_column(tmp_path):
    items = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(50)]
    source, _ = build("pairs", write(tmp_path / "p.jsonl", items))
    assert "margins_BT" not in source.next() and "labels_BT" not in source.next()


def test_a_labelled_reply_stands_beside_a_mismatched_one_that_is_not_its_own(tmp_path):
    """Prompts with many replies, some of them said under other prompts too."""
    items = [
        {"prompt": f"q{i // 5}", "completion": f"r{i % 5 + i // 10}" if i % 3 else f"only {i}", "label": i % 2 == 0}
        for i in range(200)
    ]
    source, heldout = build("labels", write(tmp_path / "k.jsonl", items))
    seen = []
    for table in (source.table, heldout.table):
        batch = every(table)
        check_layout(batch)
        found = segments(batch)
        own = collections.defaultdict(set)
        split = [[said(part).removesuffix("<|end|>") for part in
                  (s["tokens_BT"][2 : np.argmax(s["weights_BT"]) - 1], s["targets_BT"][s["weights_BT"] == 1])]
                 for s in found]  # fmt: skip
        for prompt, reply in split[::2]:
            own[prompt].add(reply)
        for (prompt, reply), (again, other), real, mismatch in zip(
            split[::2], split[1::2], found[::2], found[1::2], strict=True
        ):
            assert prompt == again and other not in own[prompt]
            assert any(other in replies for replies in own.values())
            assert set(np.abs(real["labels_BT"])) == {1.0} and not mismatch["labels_BT"].any()
            seen.append({"prompt": prompt, "completion": reply, "label": real["labels_BT"][0] > 0})
    assert len({json.dumps(item, default=bool) for item in seen}) == len(seen)
    distinct = {json.dumps(item) for item in items}
    assert {json.dumps(item, default=bool) for item in seen} == distinct


def test_replies_that_cannot_be_mismatched_are_said(tmp_path, capsys):
    items = [{"prompt": f"q{i}", "completion": "yes", "label": True} for i in range(50)]
    with pytest.raises(LmtrainError, match="no labelled replies to train on.* x no other prompt's reply to mismatch"):
        build("labels", write(tmp_path / "k.jsonl", items))
    both = [{**item, "completion": word} for item in items[:20] for word in ("yes", "no")]
    one = [{**item, "completion": ("yes", "no")[i % 2]} for i, item in enumerate(items[20:])]
    source, heldout = build("labels", write(tmp_path / "k.jsonl", both + one))
    assert "40 x no other prompt's reply to mismatch" in capsys.readouterr().out, "of prompts that have both replies"
    found = segments(every(source.table)) + segments(every(heldout.table))
    assert len(found) == 2 * 30 and "40 skipped" in source.summary()


def test_columns_computed_once_come_with_their_rows(tmp_path):
    items = [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": "bad"} for i in range(100)]
    source, heldout = build("pairs", write(tmp_path / "p.jsonl", items))
    for table in (source.table, heldout.table):
        batches = list(table.all_batches(B))
        shares = [list(table.all_batches(B, (p, 2))) for p in range(2)]
        for i, batch in enumerate(batches):
            assert (np.concatenate([s[i]["tokens_BT"] for s in shares]) == batch["tokens_BT"]).all()
        marks = np.concatenate([batch["tokens_BT"] * 0.5 for batch in batches])
        assert not marks[sum(table.rows) :].any() or (batches[-1]["segments_BT"][-1] == 0).all()
        with pytest.raises(LmtrainError, match=f"ref_logps_BT has shape .* {sum(table.rows)}x{T}"):
            table.attach("ref_logps_BT", marks[:1])
        table.attach("ref_logps_BT", marks[: sum(table.rows)])
    for batch in [source.next() for _ in range(9)] + list(heldout.batches()):
        real = batch["segments_BT"].any(axis=1)
        assert (batch["ref_logps_BT"][real] == batch["tokens_BT"][real] * 0.5).all()
        assert not batch["ref_logps_BT"][~real].any() and batch["ref_logps_BT"].dtype == np.float32


# ----------------------------------------------------------------------------------------------------------- truncation


def long_ones():
    system = {"role": "system", "content": "S" * 20}
    turns = [{"role": "user", "content": "u" * 40}, {"role": "assistant", "content": "a" * 40},
             {"role": "user", "content": "U" * 40}, {"role": "assistant", "content": "A" * 40}]  # fmt: skip
    return [
        *[{"prompt": f"q{i}", "completion": "short"} for i in range(30)],
        {"messages": [system, *turns]},
        {"messages": [{"role": "user", "content": "z" * 200}, turns[1]]},
    ]


def test_cut_on_the_right(tmp_path, capsys):
    source, heldout = build("chat", write(tmp_path / "c.jsonl", long_ones(), heldout="hash"))
    texts = [said(s["tokens_BT"]) for t in (source, heldout) for s in segments(every(t.table))]
    (long,) = [text for text in texts if "S" in text]
    whole = said(Template(TOK).encode(long_ones()[-2]["messages"])[0])
    ids = [s for t in (source, heldout) for s in segments(every(t.table)) if len(s["tokens_BT"]) == T]
    assert len(ids) == 1 and whole.startswith(long) and whole != long
    assert "1 cut" in source.summary() and "1 skipped" in source.summary()
    out = capsys.readouterr().out
    assert "1 x nothing to learn" in out and "c.jsonl:32: nothing to learn: no token of the assistant's is left" in out
    assert not any("z" in text for text in texts)


def test_cut_on_the_left_keeps_the_system_message(tmp_path):
    data = write(tmp_path / "c.jsonl", long_ones(), heldout="hash", truncate="left")
    source, heldout = build("chat", data)
    whole = said(Template(TOK).encode(long_ones()[-2]["messages"])[0])
    kept = [s for t in (source, heldout) for s in segments(every(t.table)) if len(s["tokens_BT"]) == T]
    assert len(kept) == 2 and "2 cut" in source.summary()
    (long,) = [s for s in kept if "S" in said(s["tokens_BT"])]
    (plain,) = [s for s in kept if "z" in said(s["tokens_BT"])]
    head = "<|endoftext|><|system|>" + "S" * 20 + "<|end|>"
    text = said(long["tokens_BT"])
    assert text.startswith(head) and whole.endswith(text.removeprefix(head))
    assert said(long["targets_BT"][long["weights_BT"] == 1]).endswith("A" * 40 + "<|end|>")
    assert said(plain["tokens_BT"]).startswith("<|endoftext|>zzz")
    wide = {"messages": [{"role": "system", "content": "S" * 90}, *long_ones()[-2]["messages"][1:]]}
    source, heldout = build("chat", write(tmp_path / "w.jsonl", [*long_ones()[:30], wide], truncate="left"))
    texts = [said(s["tokens_BT"]) for t in (source, heldout) for s in segments(every(t.table))]
    assert all(len(text) < 40 or "S" not in text for text in texts), "a system message of more than half a row goes"


def test_drop_and_refuse(tmp_path, capsys):
    source, heldout = build("chat", write(tmp_path / "c.jsonl", long_ones(), truncate="drop"))
    assert sum(map(len, source.table.members + heldout.table.members)) == 30
    assert "2 x longer than a row" in capsys.readouterr().out
    with pytest.raises(LmtrainError, match=r"c\.jsonl:31: \d+ tokens, a row has data\.row_length=128.*left or drop"):
        build("chat", write(tmp_path / "c.jsonl", long_ones(), truncate="refuse"))


@pytest.mark.parametrize("mode", ["right", "left"])
def test_a_pair_longer_than_a_row_shares_it(tmp_path, mode):
    short = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(60)]
    long = [
        {"prompt": "p" * 10, "chosen": "c" * 90, "rejected": "r" * 90},
        {"prompt": "P" * 10, "chosen": "c" * 90, "rejected": "r" * 20},
        {"prompt": "x" * 10, "chosen": "e" * 60 + "1", "rejected": "e" * 60 + "2"},
    ]
    source, heldout = build("pairs", write(tmp_path / "p.jsonl", short + long, truncate=mode, heldout_fraction=0.1))
    both = segments(every(source.table)) + segments(every(heldout.table))
    lengths = collections.defaultdict(list)
    for s in both:
        text = said(s["tokens_BT"])
        for mark in "cre":
            if mark * 4 in text:
                lengths[mark].append(len(s["tokens_BT"]))
    if mode == "right":
        assert sorted(lengths["c"]) == [64, T - 35] and lengths["r"][:1] == [64]
        assert not lengths["e"], "once cut, the two are the same"
    else:
        assert len(lengths["e"]) == 2 and sum(lengths["c"]) + sum(lengths["r"]) == 2 * T


# ------------------------------------------------------------------------------------------------------------ malformed

M = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
MALFORMED = {
    "chat": [
        ("{broken", "not a JSON line"),
        ("[1, 2]", "a row is no object"),
        ('"text"', "a row is no object"),
        ("{}", "no conversation in it"),
        ({"prompt": "p"}, "no conversation in it"),
        ({"messages": 3}, "no messages"),
        ({"messages": []}, "no messages"),
        ({"messages": [M[0]]}, "no assistant turn"),
        ({"messages": [M[0], 3]}, "a message is no object"),
        ({"messages": [M[0], {**M[1], "role": "robot"}]}, "unknown role"),
        ({"messages": [M[0], {**M[1], "content": ""}]}, "empty content"),
        ({"messages": [{**M[0], "content": 7}, M[1]]}, "content is no text"),
        ({"messages": [{**M[0], "content": [{"type": "image_url"}]}, M[1]]}, "content is no text"),
        ({"messages": [M[0], {**M[1], "weight": 7}]}, "unusable weight"),
        ({"messages": [M[0], {**M[1], "tool_calls": [3]}]}, "unusable tool call"),
        ({"messages": [*M, M[1]]}, "two assistant turns in a row"),
        ({"messages": [*M, {"role": "system", "content": "s"}, *M]}, "a system message that is not the first"),
        ({"messages": [*M, {"role": "tool", "content": "t"}, M[1]]}, "a tool result without a tool call"),
        ({"messages": M, "tools": "{"}, "unusable tools"),
        ({"messages": [M[0], {**M[1], "weight": 0}]}, "nothing to learn"),
        ({"prompt": "p" * 200, "completion": "c"}, "nothing to learn"),
        ({"prompt": " ", "completion": "c"}, "empty prompt"),
        ({"prompt": "p", "completion": ""}, "empty reply"),
        ("[" * 50_000, "JSON nested too deeply to be read"),
    ],
    "pairs": [
        ({"prompt": "p", "rejected": "b"}, "no chosen reply"),
        ({"prompt": "p", "chosen": "b"}, "no rejected reply"),
        ({"prompt": "p", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "empty prompt"),
        ({"chosen": "a", "rejected": "b"}, "no prompt"),
        ({"prompt": "p", "chosen": "a", "rejected": ""}, "empty reply"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": "x"}, "unusable margin"),
        ({"prompt": "p" * 70, "chosen": "a", "rejected": "b"}, "nothing to learn"),
        ({"prompt": "p" * 30, "chosen": "x" * 90 + "a", "rejected": "x" * 90 + "b"}, "nothing to learn"),
    ],
    "labels": [
        ({"prompt": "p", "completion": "c"}, "no label"),
        ({"prompt": "p", "completion": "c", "label": "good"}, "unusable label"),
        ({"prompt": "p", "completion": "", "label": True}, "empty reply"),
        ({"messages": [M[1]], "label": True}, "no prompt"),
    ],
}  # fmt: skip
SOUND = {
    "chat": [{"messages": [{"role": "user", "content": f"q{i}"}, M[1]]} for i in range(30)],
    "pairs": [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(30)],
    "labels": [{"prompt": f"q{i}", "completion": f"r{i}", "label": True} for i in range(30)],
}
CASES = [(kind, item, reason) for kind, items in MALFORMED.items() for item, reason in items]


@pytest.mark.parametrize(("kind", "item", "reason"), CASES, ids=[f"{k}: {r} {i}" for i, (k, _, r) in enumerate(CASES)])
def test_a_malformed_row_is_skipped_and_named_or_refused(tmp_path, capsys, kind, item, reason):
    items = [*SOUND[kind][:10], item, *SOUND[kind][10:]]
    # heldout_fraction: small, so that the last rows are held out and the malformed one would be trained on
    data = write(tmp_path / "m.jsonl", items, heldout_fraction=0.1)
    source, heldout = build(kind, data)
    assert sum(map(len, source.table.members + heldout.table.members)) == 30
    out = capsys.readouterr().out
    assert f"left out: 1 x {reason}" in out and f"m.jsonl:11: {reason}: " in out
    assert "1 skipped" in source.summary()
    if reason != "nothing to learn":  # which data.truncate decides
        with pytest.raises(LmtrainError, match=rf"m\.jsonl:11: {reason}: "):
            build(kind, Data(**{**vars(data), "malformed": "refuse"}))


def test_reasons_are_counted_and_the_first_rows_shown(tmp_path, capsys):
    bad = [{"prompt": "p"}] * 4 + [{"messages": [M[0]]}] * 3 + ["{"] * 2
    build("chat", write(tmp_path / "m.jsonl", SOUND["chat"] + bad))
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "data: left out: 4 x no conversation in it, 3 x no assistant turn, 2 x not a JSON line"
    assert len(out) == 6 and "m.jsonl:31: no conversation in it: messages, conversations" in out[1]


def test_nothing_usable_is_an_error(tmp_path):
    empty = write(tmp_path / "m.jsonl", [{"prompt": "p"}] * 3)
    for run in (lambda: build("chat", empty), lambda: conversations.preflight("chat", empty)):
        with pytest.raises(LmtrainError, match="^data.*: no conversations to train on: left out: 3 x no conversation"):
            run()
    with pytest.raises(LmtrainError, match="no conversations to train on: no rows"):
        build("chat", write(tmp_path / "m.jsonl", []))
    with pytest.raises(LmtrainError, match=r"heldout_fraction=0\.2 .* holds out none of 1 conversations"):
        build("chat", write(tmp_path / "m.jsonl", SOUND["chat"][:1]))
    with pytest.raises(ConfigError, match=r"data\.truncate: got 'rigth'.*Did you mean right\?"):
        build("chat", write(tmp_path / "m.jsonl", SOUND["chat"], truncate="rigth"))
    with pytest.raises(ConfigError, match=r"data\.malformed: got 'skp'.*Did you mean skip\?"):
        conversations.preflight("chat", write(tmp_path / "m.jsonl", SOUND["chat"], malformed="skp"))
    with pytest.raises(ConfigError, match=r"data\.columns: 'promt' is none of"):
        build("chat", write(tmp_path / "m.jsonl", SOUND["chat"], columns={"promt": "x"}))


# ------------------------------------------------------------------------------------------------------------ the rest


def test_the_summary_says_what_there_is(tmp_path):
    items = SOUND["chat"] * 2 + [{"prompt": "p"}]
    source, heldout = build("chat", write(tmp_path / "m.jsonl", items))
    assert source.summary() == (
        f"24 conversations ({source.tokens} tokens, 48 to learn) in {source.rows} rows of 128"
        f" ({100 * source.tokens // (source.rows * T)} % full), 6 held out, 1 skipped, 30 duplicates dropped"
    )
    assert source.report() == {} and "6 held-out" not in heldout.summary()
    assert heldout.summary() == f"{heldout.rows} held-out rows (12 targets, 6 bytes) are scored"


def test_a_tokenizer_learns_from_the_texts_that_are_trained_on(tmp_path):
    data = write(tmp_path / "p.jsonl", SOUND["pairs"])
    texts = list(conversations.texts("pairs", data))
    _, heldout = build("pairs", data)
    held = {said(s["tokens_BT"]).split("<|user|>")[1].split("<|end|>")[0] for s in segments(every(heldout.table))}
    assert set(texts) == {"a", "b", *(row["prompt"] for row in SOUND["pairs"])} - held and held


def test_documents_have_the_same_face(tmp_path):
    """summary(), tokens, rows, report(): what the experiment asks of every source."""
    (tmp_path / "t.txt").write_text("some text " * 400)
    data = Data(source="text", path=str(tmp_path / "t.txt"), row_length=64, heldout_fraction=0.2)
    source, heldout = pipeline.build(data, TOK, 2, 0, tmp_path / "d", progress=False)
    assert source.summary() == source.shards.summary() and source.tokens == source.shards.total("tokens") == 3201
    assert source.rows == -(-3201 // 64) and source.report() == {}
    assert heldout.summary() == "13 held-out rows (801 targets, 800 bytes) are scored"
