"""Preparation and batches in real processes that find each other, as on several hosts."""

import json
import os
import socket
import subprocess
import sys

import pytest

WORKER = """
import json, os, sys, time
import jax
port, index, folder, path = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index, heartbeat_timeout_seconds=10)
from lmtrain.data import pipeline, shards, tokenizer
from lmtrain.schema import Data
from lmtrain.types import LmtrainError
work = shards._prepare
def prepare(*args):
    assert jax.process_index() == 0, "process 0 alone prepares"
    time.sleep(2)
    work(*args)
shards._prepare = prepare
data = Data(source="jsonl", path=path, row_length=16, heldout_fraction=0.2)
try:
    source, heldout = pipeline.build(data, tokenizer.bytes_tokenizer(), 4, 0, folder, progress=False)
    print(json.dumps({"rows": [source.next()["tokens_BT"].tolist() for _ in range(3)], "state": source.state()}))
except LmtrainError as error:
    print(json.dumps({"error": str(error)}))
sys.stdout.flush()
time.sleep(3 * (index == 0))  # the coordinator leaves last, else its end ends the other
os._exit(0)
"""


def run(tmp_path, path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "XLA_FLAGS": ""}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(port), str(i), str(tmp_path / "data"), str(path)],
            env=environment, stdout=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    return [json.loads(worker.communicate(timeout=120)[0].splitlines()[-1]) for worker in workers]


@pytest.mark.slow
def test_process_0_prepares_and_the_other_waits_for_it(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(200)))
    first, second = run(tmp_path, path)
    assert first["state"] == second["state"] and first["state"]["next_index"] == 12
    assert first["rows"] != second["rows"] and all(len(rows) == 2 for rows in first["rows"] + second["rows"])


@pytest.mark.slow
@pytest.mark.parametrize("content", [None, '{"text": "one"}\nbroken\n'])
def test_what_process_0_cannot_read_ends_all_of_them(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    if content:
        path.write_text(content)
    first, second = run(tmp_path, path)
    reason = "rows.jsonl:2: not a JSON line" if content else "no such file"
    assert reason in first["error"] and "process 0" in second["error"]
