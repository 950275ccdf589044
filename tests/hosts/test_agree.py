"""What differs between hosts is named, with both values, before the first step."""

import copy
import os
import pathlib

import pytest

from lmtrain import config
from lmtrain.hosts import agree


def rows(tmp_path):
    e = config.build(experiment())
    one = agree.row(e, tmp_path) | {"behind": 0.0}
    return {i: copy.deepcopy(one) | {"name": f"process {i} (host n{i}, pid 7)"} for i in range(3)}


def experiment():
    c = config.experiment()
    c.stages.pretrain = config.stage()
    return c


def test_equal_rows_agree(tmp_path):
    assert agree.difference(rows(tmp_path)) == ""


@pytest.mark.parametrize(
    "path, value, parts",
    [
        (("settings", "stages.pretrain.optim.lr"), 0.5, ("stages.pretrain.optim.lr is 0.5", "0.003 on process 0")),
        (("versions", "jax"), "0.1", ("has jax 0.1, process 0",)),
        (("versions", "lmtrain"), "with source 12", ("has lmtrain with source 12, process 0",)),
        (("behind",), 11.0, ("clock", "11 s behind")),
        (("behind",), -11.0, ("clock", "11 s ahead")),
        (("unwritable",), "/x: Permission denied", ("cannot write to --workdir: /x: Permission denied",)),
    ],
)
def test_what_differs_is_named_with_its_host(tmp_path, path, value, parts):
    found = rows(tmp_path)
    at = found[2]
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    message = agree.difference(found)
    assert "process 2 (host n2, pid 7)" in message and all(part in message for part in parts), message


def test_a_setting_that_only_one_host_has_is_named(tmp_path):
    found = rows(tmp_path)
    found[1]["settings"]["stages.pretrain.loss.beta"] = 0.1
    assert "stages.pretrain.loss.beta is 0.1, but None on process 0" in agree.difference(found)


def test_small_skew_is_allowed(tmp_path):
    found = rows(tmp_path)
    found[1]["behind"] = 9.0
    assert agree.difference(found) == ""


def test_a_folder_that_only_process_0_sees_is_refused():
    found = {i: {"name": f"process {i}", "seen": i < 2} for i in range(3)}
    assert "runs/a on process 2 is not the folder that process 0 sees" in agree.unseen(found, pathlib.Path("runs/a"))


def test_what_cannot_be_written_says_why_and_what_can_is_left_as_it_was(tmp_path):
    assert agree.unwritable(tmp_path / "new/run") == "" and list((tmp_path / "new/run").iterdir()) == []
    (tmp_path / "file").touch()
    assert "file/run: Not a directory" in agree.unwritable(tmp_path / "file/run")
    if os.path.exists("/proc"):
        assert agree.unwritable(pathlib.Path("/proc/run")).startswith("/proc/run: ")
