"""Programs that want out, or want a score that they have not earned, and honest ones that get theirs.

Every hostile program (sandbox_programs.txt) runs as an answer that is wrong. What it tries must not succeed (`stays_in`
looks from outside), it must not score, and all is over, with nothing left behind, within its time.
"""

import concurrent.futures
import os
import pathlib
import re
import site
import socket
import struct
import subprocess
import sys
import tempfile
import time

import pytest

from lmtrain import sandbox
from lmtrain.sandbox import jail, wire
from lmtrain.types import LmtrainError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is for Linux")

QUICK = sandbox.Limits(seconds=4, cpu_seconds=2, memory=256 << 20)
TESTS = "assert f(3) == 90210\nassert f(4) == 'a secret'\nassert f([5]) == {'k': (1, 2)}"
WRONG = "\ndef f(x):\n    return None\n"


def programs(kind):
    """{name: source} of one section of sandbox_programs.txt."""
    text = (pathlib.Path(__file__).parent / "sandbox_programs.txt").read_text()
    found = {}
    for block in text.split("\n==== ")[1:]:
        head, _, source = block.partition("\n")
        section, _, name = head.partition(": ")
        if section == kind:
            found[name] = source.replace("ZERO", "\0").replace("HALF", "\ud800")
    return found


ESCAPES = programs("escapes")  # each prints ESCAPED where it gets what it wants
CHEATS = programs("cheats")  # each wants a score
ENDLESS = programs("endless")  # each wants never to end


@pytest.fixture(autouse=True)
def own_folders(tmp_path_factory, monkeypatch):
    """So that what another test process has running is not taken for left over."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("folders")))


@pytest.fixture
def outside(tmp_path):
    (tmp_path / "canary").write_text("alive")
    os.chmod(tmp_path / "canary", 0o600)
    return tmp_path


def left_over():
    """Folders and processes of sandboxes that are still there."""
    folders = list(pathlib.Path(tempfile.gettempdir()).iterdir())
    mine = []
    for entry in pathlib.Path("/proc").iterdir():
        try:
            status = (entry / "status").read_text()
            if (
                entry.name.isdigit()
                and f"PPid:\t{os.getpid()}\n" in status
                and b"inside.main" in (entry / "cmdline").read_bytes()
            ):
                mine.append(entry.name)
        except OSError:
            continue
    return folders + mine


def assert_stays_in(source, outside, limits=QUICK, tests=TESTS):
    """Runs a hostile program both ways; it gets nothing and leaves nothing. Returns both results."""
    before = (outside / "canary").stat()
    results = []
    for go in (lambda: sandbox.run(source, limits=limits), lambda: sandbox.check(source, tests, "f", limits)):
        begin = time.monotonic()
        results.append(go())
        assert time.monotonic() - begin < limits.seconds + 6, "over its time, the start of interpreters included"
        assert results[-1].seconds < limits.seconds + 1
        assert not re.search(r"ESCAPED(?!\?)", results[-1].output + results[-1].error)
        assert len(results[-1].output) <= limits.output
    assert not results[1].ok and results[1].error
    assert [p.name for p in outside.iterdir()] == ["canary"] and (outside / "canary").read_text() == "alive"
    after = (outside / "canary").stat()
    assert (before.st_mode, before.st_mtime) == (after.st_mode, after.st_mtime)
    assert not left_over()
    return results


# Calls that seccomp must refuse whatever the C library would do, by their number on x86_64.
RAW = {
    425: (4, 0),  # io_uring_setup, which gets around seccomp
    321: (0, 0, 0),  # bpf
    323: (0,),  # userfaultfd
    298: (0, 0, -1, -1, 0),  # perf_event_open
    250: (0, 0),  # keyctl
    272: (0x10000000,),  # unshare(CLONE_NEWUSER)
    165: (0, 0, 0, 0, 0),  # mount
    101: (0, 0, 0, 0),  # ptrace(TRACEME)
    311: (1, 0, 0, 0, 0, 0),  # process_vm_writev
    434: (1, 0),  # pidfd_open
    319: (b"x", 0),  # memfd_create
    135: (0xFFFFFFFF,),  # personality
    29: (0, 4096, 0o1600),  # shmget
    0x40000000 + 39: (),  # getpid of the x32 ABI, a second door to every call
}


@pytest.mark.parametrize("name", ESCAPES)
def test_a_program_that_wants_out_stays_in(name, outside):
    if name == "asks the kernel" and os.uname().machine != "x86_64":
        pytest.skip("numbers of x86_64")
    with socket.create_server(("127.0.0.1", 0)) as server:
        words = {"OUTSIDE": str(outside), "PORT": str(server.getsockname()[1]), "NUMBERS": repr(RAW),
                 "PACKAGES": site.getsitepackages()[0]}  # fmt: skip
        source = ESCAPES[name]
        for word, value in words.items():
            source = source.replace(word, value)
        assert_stays_in(source + WRONG, outside)
    assert not os.path.exists("/dev/shm/lmtrain-escaped")


FREE = [
    "reads /etc/passwd", "reads installed packages", "lists /", "writes outside", "overwrites outside",
    "truncates outside by name", "changes a mode outside", "removes outside", "links outside in", "symlinks outside in",
    "opens a socket", "connects to the trainer", "forks", "starts a shell", "becomes a shell", "starts a thread",
    "asks libc", "hides a file in a folder", "hides a file by removing it", "writes a huge file",
]  # fmt: skip


@pytest.mark.parametrize("name", FREE)
def test_the_same_program_gets_out_where_nothing_holds_it(name, tmp_path):
    """Else the test above would pass for any reason."""
    (tmp_path / "canary").write_text("alive")
    with socket.create_server(("127.0.0.1", 0)) as server:
        source = ESCAPES[name].replace("OUTSIDE", str(tmp_path)).replace("PORT", str(server.getsockname()[1]))
        source = source.replace("PACKAGES", site.getsitepackages()[0])
        done = subprocess.run([sys.executable, "-S", "-c", source], cwd=tmp_path, capture_output=True, text=True)
    assert re.search(r"ESCAPED(?!\?)", done.stdout), done.stderr


@pytest.mark.parametrize("name", CHEATS)
def test_a_program_that_cheats_does_not_score(name, outside):
    assert_stays_in(CHEATS[name], outside)


SWALLOWING = """
for x in (1, 2):
    try:
        assert f(x) == 3
    except BaseException:
        pass
else:
    assert f(0) == 4
"""


@pytest.mark.parametrize("name", ["ends the loop of the tests", "equals everything", "exits with 0"])
@pytest.mark.parametrize("tests", ["assert all(map(lambda a, b: f(a) == b, [1, 2], [3, 4]))", SWALLOWING])
def test_neither_does_it_under_careless_tests(name, tests, outside):
    assert_stays_in(CHEATS[name], outside, tests=tests)


@pytest.mark.parametrize("name", ENDLESS)
def test_a_program_without_end_is_ended(name, outside):
    limits = sandbox.Limits(seconds=0.8, cpu_seconds=1, memory=256 << 20)
    function = "def f(x):\n" + "\n".join(f"    {line}" for line in ENDLESS[name].splitlines())
    ran, _ = assert_stays_in(f"{function}\nif __name__ == '__main__': f(1)", outside, limits)
    assert not ran.ok and "limit" in ran.error


def test_work_and_waiting_have_limits_of_their_own():
    long = sandbox.Limits(seconds=30, cpu_seconds=1)
    assert "CPU" in sandbox.run("while True: pass", limits=long).error
    assert "CPU" in sandbox.check("def f(x):\n    while True: pass", "f(1)", "f", long).error
    assert "time limit" in sandbox.run("import time\ntime.sleep(9)", limits=sandbox.Limits(seconds=0.5)).error
    for stream in ("stdout", "stderr"):
        assert "output limit" in sandbox.run(f"import sys\nwhile True: print('x' * 999, file=sys.{stream})").error


def test_tests_that_swallow_everything_do_not_bring_a_dead_program_back():
    tests = "f(1)\ntry:\n    f(2)\nexcept BaseException: pass"
    assert sandbox.check("def f(x): return 1", tests, "f").ok
    dead = sandbox.check("import os\ndef f(x): return 1 if x == 1 else os._exit(0)", tests, "f")
    assert not dead.ok and "the program ended" in dead.error


def test_tests_that_ask_nothing_say_nothing():
    for tests in ("", "pass", "def check(candidate): pass", "async def check(candidate): assert candidate(1)"):
        result = sandbox.check("def f(x): return 1", tests, "f")
        assert not result.ok and "never called f" in result.error


def test_tests_that_leave_early_give_no_verdict():
    for tests in ("import os\nf(1)\nos._exit(0)", "f(1)\nraise SystemExit(0)", "while f(1): pass"):
        result = sandbox.check("def f(x): return 1", tests, "f", sandbox.Limits(seconds=1))
        assert not result.ok and result.error


def test_helpers_come_from_the_setup_never_from_the_program():
    source = "def helper(x): return 0\ndef f(x): return x"
    tests = "assert helper(f(3)) == 0"
    assert "NameError" in sandbox.check(source, tests, "f").error
    assert not sandbox.check(source, tests, "f", setup="def helper(x): return x").ok
    assert sandbox.check(source, tests, "f", setup="def helper(x): return x - 3\ndef f(x): ...").ok


HONEST = {name: source.split("----\n") for name, source in programs("honest").items()}
HONEST["is long"] = ("def f(x): return x\n" + "# comment\n" * 20000, "assert f('y' * 200000) == 'y' * 200000")


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_program_scores(name):
    source, tests = HONEST[name]
    result = sandbox.check(source, tests, "g" if name == "HumanEval" else "f")
    assert result.ok and not result.error, result
    assert (result.output == "hello\n") == (name == "prints")


VALUES = [
    None, True, 0, -1, 2**70, -(10**5000), 1.5, float("inf"), -0.0, 2j, "é\n\ud800", b"\x00\xff", bytearray(b"x"),
    [], (), {}, set(), frozenset([1]), range(3, 9, 2), [(1, [2, {"a": {3, 4}}])], 
    {1: "x", (2, 3): None, None: [True]}, {"tuple": [1]},
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda v: repr(v)[:20] if not isinstance(v, int) else str(type(v)))
def test_plain_values_cross_unchanged(value):
    import json

    back = wire.decode(json.loads(json.dumps(wire.encode(value))))
    assert back == value and type(back) is type(value)
    assert str(back) == str(value) if isinstance(value, float) else True


def test_true_and_one_stay_apart():
    assert wire.decode(wire.encode([True, 1, 1.0])) == [True, 1, 1.0]
    assert [type(v) for v in wire.decode(wire.encode([True, 1, 1.0]))] == [bool, int, float]


def test_an_object_is_no_answer_even_where_any_would_do():
    source = "class E:\n    def __eq__(self, o): return True\ndef f(x): return E()"
    for tests in ("assert f(1)", "assert f(1) == True", "assert f(1) is not None", "f(1)"):
        result = sandbox.check(source, tests, "f")
        assert not result.ok and "f returned a E" in result.error


def test_endless_answers_are_not_waited_for(monkeypatch):
    assert "iterator of more than" in sandbox.check("def f(x):\n    while True: yield 1", "list(f(1))", "f").error
    monkeypatch.setattr(wire, "LONGEST", 1000)
    reader, writer = os.pipe()
    lines = wire.Lines(reader)
    os.write(writer, b"x" * 900 + b"\n")
    assert lines.next() == b"x" * 900
    os.write(writer, b"y" * 1100 + b"\n")
    assert lines.next() is None
    os.close(reader)
    os.close(writer)


def test_a_program_reads_its_input_and_its_output_comes_back():
    result = sandbox.run("import sys\nfor line in sys.stdin: print(line.strip()[::-1])\nprint('é')", "abc\ndef\n")
    assert result.ok and result.output == "cba\nfed\né\n"
    failed = sandbox.run("print('before')\n1 / 0")
    assert not failed.ok and failed.output == "before\n" and "ZeroDivisionError" in failed.error


def test_a_program_sees_nothing_of_the_trainers_environment(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    assert "hunter2" not in sandbox.run("import os\nprint(os.environ)").output


def test_the_same_program_gives_the_same_result_twice():
    source = "print({'b', 'a', 'c', 'd'}, hash('x'))"
    assert sandbox.run(source).output == sandbox.run(source).output


def test_threads_may_check_at_once():
    sources = [f"def f(x): return x + {i % 2}" for i in range(12)]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda s: sandbox.check(s, "assert f(1) == 2", "f").ok, sources))
    assert results == [False, True] * 6
    assert not left_over()


def test_nothing_stays_open():
    sandbox.check("def f(x): return 1", "f(1)", "f")
    before = len(os.listdir("/proc/self/fd"))
    for source in ("def f(x): return 1", "def f(", "import os\nos._exit(0)"):
        sandbox.check(source, "assert f(1) == 1", "f")
        sandbox.run(source)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_program_dies_with_the_trainer(tmp_path):
    script = "from lmtrain import sandbox as s; s.run('import time; time.sleep(99)', limits=s.Limits(seconds=60))"
    trainer = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "TMPDIR": str(tmp_path)})

    def program():
        for entry in pathlib.Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and f"PPid:\t{trainer.pid}\n" in (entry / "status").read_text():
                    if b"inside.main" in (entry / "cmdline").read_bytes():
                        return entry.name
            except OSError:
                pass
        return None

    deadline = time.monotonic() + 60
    while not (found := program()):
        assert time.monotonic() < deadline and trainer.poll() is None
        time.sleep(0.1)
    time.sleep(0.5)  # until it is locked in
    trainer.kill()
    trainer.wait()

    def lives():
        try:  # a zombie has ended, whoever fails to bury it
            return "State:\tZ" not in pathlib.Path(f"/proc/{found}/status").read_text()
        except OSError:
            return False

    while lives():
        assert time.monotonic() < deadline, "it outlived the trainer"
        time.sleep(0.1)


def test_a_locked_process_has_no_privileges_left():
    """Read through a file that was open before: inside, /proc is closed."""
    code = (
        "import sys, os; sys.path.insert(0, sys.argv[1]); import jail; status = open('/proc/self/status')\n"
        "jail.enter(parent=os.getppid(), folder='', memory=1 << 29, cpu_seconds=5, file_size=0)\n"
        "print(status.read())"
    )
    argv = [sys.executable, "-S", "-c", code, str(pathlib.Path(jail.__file__).parent)]
    said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    fields = dict(line.split(":\t") for line in said.splitlines() if ":\t" in line)
    assert {int(fields[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {0}
    assert fields["NoNewPrivs"] == "1" and fields["Seccomp"] == "2"


# A kernel without a layer, or with one that says yes and does nothing: a filter on the trainer's own process.
WITHOUT = """
import ctypes, struct
from lmtrain import sandbox
from lmtrain.types import LmtrainError
def without(call, answer, argument=None):
    end = (6, 0, 0, 0x00050000 | answer)
    code = [(0x20, 0, 0, 0), (0x15, 0, 3, call), (0x20, 0, 0, 16), (0x15, 0, 1, argument or 0), end]
    if argument is None:
        code = [(0x20, 0, 0, 0), (0x15, 0, 1, call), end]
    code = b"".join(struct.pack("HBBI", *line) for line in code + [(6, 0, 0, 0x7FFF0000)])
    buffer = ctypes.create_string_buffer(code, len(code))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer)), 0, 0) == 0
without(%s)
for go in (lambda: sandbox.run("print('RAN')"), lambda: sandbox.check("def f(x): return 1", "f(1)", "f")):
    try:
        print(go())
    except LmtrainError as error:
        print("REFUSED", error)
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of x86_64")
@pytest.mark.parametrize(
    ("call", "word"),
    [
        ("444, 38", "Landlock"),  # no such call
        ("444, 95", "Landlock"),  # built in, switched off
        ("446, 0", "Landlock that holds"),  # says yes, does nothing
        ("157, 22, 22", "seccomp"),  # prctl(PR_SET_SECCOMP) is no such option
        ("157, 0, 22", "a seccomp that holds"),
    ],
)
def test_where_a_layer_is_missing_or_does_nothing_nothing_is_run(call, word):
    done = subprocess.run([sys.executable, "-c", WITHOUT % call], capture_output=True, text=True)
    assert done.stdout.count("REFUSED") == 2 and done.stdout.count(f"It lacks: {word}") == 2, done.stdout + done.stderr
    assert "RAN" not in done.stdout and "Linux 5.13" in done.stdout


def test_an_interpreter_that_does_not_start_is_named_with_what_it_says(monkeypatch, tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\necho 'error while loading libpython' >&2\nexit 127\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    for go in (lambda: sandbox.run(""), lambda: sandbox.check("", "", "f")):
        with pytest.raises(LmtrainError, match="interpreter that starts .*/python: error while loading libpython"):
            go()


def test_another_system_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(LmtrainError, match="lacks: Linux"):
        sandbox.run("print(1)")


def answer(machine, number, *arguments, arch=None, pid=77):
    """What the filter says to a system call: "allow", "kill" or an errno. Runs the BPF program as the kernel does."""
    code = list(struct.iter_unpack("HBBI", jail._filter(machine, pid)))
    arguments = [a % 2**64 for a in (*arguments, *[0] * 6)][:6]
    data = struct.pack("=IIQ6Q", number, arch or {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine], 0, *arguments)
    at = a = 0
    while True:
        op, jump, otherwise, k = code[at]
        at += 1
        if op == 0x20:
            a = int.from_bytes(data[k : k + 4], "little")
        elif op == 0x54:
            a &= k
        elif op == 0x15:
            at += jump if a == k else otherwise
        elif op == 0x05:
            at += k
        else:
            assert op == 0x06
            return {0x7FFF0000: "allow", 0x80000000: "kill"}.get(k, k & 0xFFFF)


CALLS = [
    ("kill", "allow", [(77, 9)]),
    ("kill", 1, [(76, 9), (-1, 9), (0, 9), (-77, 9), (2**32 + 76, 9)]),
    ("tgkill", "allow", [(77, 77, 6)]),
    ("tgkill", 1, [(76, 76, 9)]),
    ("prlimit64", "allow", [(0, 9), (77, 9)]),
    ("prlimit64", 1, [(76, 0), (1, 0)]),
    ("openat", "allow", [(-100, 1, os.O_RDONLY), (-100, 1, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), (3, 1, os.O_RDWR)]),
    ("openat", 1, [(-100, 1, 0o20200002), (-100, 1, os.O_RDONLY | os.O_TRUNC), (-100, 1, 2**32 | os.O_TRUNC)]),
    ("fcntl", "allow", [(1, 1), (1, 3), (1, 4), (1, 1030)]),
    ("fcntl", 1, [(1, 8, 76), (1, 10, 9), (1, 15), (1, 1024), (1, 1026), (1, 1031), (1, 2**32 + 8)]),
    ("ioctl", "allow", [(1, 0x5401), (1, 0x5421)]),
    ("ioctl", 1, [(0, 0x5412), (3, 0x8901), (3, 0x8902), (0, 0x541C)]),
    ("socketpair", "allow", [(1, 1), (1, 1 | 0o2004000)]),
    ("socketpair", 1, [(1, 2), (1, 5), (2, 1), (16, 3)]),
    ("sendto", "allow", [(3, 1, 1, 0, 0, 0)]),
    ("sendto", 1, [(3, 1, 1, 0, 0x7F00_0000_0001, 16), (3, 1, 1, 0, 0x7F00_0000_0000, 16), (3, 1, 1, 0, 1, 16)]),
    ("read", "allow", [(0, 1, 1)]),
]  # fmt: skip


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize(("name", "says", "calls"), CALLS)
def test_the_filter_looks_at_arguments(machine, name, says, calls):
    """Some of these the second layer would stop too, so they are asked of the filter itself, for both machines."""
    number = jail.numbers(machine)[name]
    for arguments in calls:
        assert answer(machine, number, *arguments) == says, arguments


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_allows_no_other_call(machine):
    allowed = {n for n in range(1024) if answer(machine, n, *[5] * 6) == "allow"}
    assert allowed < set(jail.numbers(machine).values())
    assert answer(machine, 435) == 38, "clone3 is no such call, so that clone is tried"
    # clone, fork, vfork, execve, execveat; socket, connect; ptrace; unlink, rename, mkdir, chmod; prctl, seccomp.
    more = {
        "x86_64": [56, 57, 58, 59, 322, 41, 42, 101, 87, 82, 83, 90, 157, 317],
        "aarch64": [220, 221, 281, 198, 203, 117, 35],
    }
    for number in [*more[machine], 434, 425, 2**30 + 39]:
        assert answer(machine, number) == 1
    assert answer(machine, 63, arch=0x40000003) == "kill", "another architecture's calls have other numbers"
    with pytest.raises(jail.Refused, match="riscv64.*x86_64 and aarch64"):
        jail.numbers("riscv64")


def test_files_have_a_limit_each_and_together():
    one = "f = open('a', 'wb')\nfor _ in range(8): f.write(b'x' * (1 << 20)); f.flush()"
    many = "for i in range(8):\n    open(str(i), 'wb').write(b'x' * (1 << 20))"
    wait = "\nimport time\ntime.sleep(.5)"
    size, disk = sandbox.Limits(file_size=4 << 20, disk=64 << 20), sandbox.Limits(file_size=64 << 20, disk=4 << 20)
    assert "File too large" in sandbox.run(one, limits=size).error and sandbox.run(many, limits=size).ok
    assert "disk limit" in sandbox.run(one + wait, limits=disk).error
    assert "disk limit" in sandbox.run(many + wait, limits=disk).error
    assert "limit of 256 files" in sandbox.run("for i in range(300): open(str(i), 'w')" + wait).error


def test_numbers_of_system_calls_are_the_kernels():
    """Against the kernel's own headers, where they are installed."""
    headers = {
        "x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h",
        "aarch64": "/usr/include/asm-generic/unistd.h",
    }
    for machine, header in headers.items():
        if not os.path.exists(header):
            pytest.skip("no kernel headers")
        text = pathlib.Path(header).read_text()
        known = {name: int(n) for name, n in re.findall(r"#define\s+__NR(?:3264)?_(\w+)\s+(\d+)", text)}
        known |= {"newfstatat": known.get("fstatat", known.get("newfstatat"))}
        ours = jail.numbers(machine)
        assert ours == {name: known.get(name) for name in ours}
        assert len(set(ours.values())) == len(ours)


ORDINARY = """
from lmtrain import sandbox
assert sandbox.check("def f(x): return x + 1", "assert f(1) == 2", "f").ok
for bad in ("open('/etc/passwd')", "open('/tmp/x', 'w')", "import socket; socket.socket()", "import os; os.fork()",
            "import os; os.kill(os.getppid(), 9)", "x = bytearray(8 << 30)", "while True: pass"):
    assert not sandbox.run(bad, limits=sandbox.Limits(cpu_seconds=1)).ok, bad
print("HELD")
"""


@pytest.mark.skipif(os.getuid() != 0, reason="the other tests already run as an ordinary user")
def test_it_holds_for_an_ordinary_user_too():
    """The same as user 65534, without any capability, by an interpreter that such a user can read."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    root = pathlib.Path(sandbox.__file__).parent.parent.parent
    env = {"PYTHONPATH": os.pathsep.join([str(root), *site.getsitepackages()]), "PYTHONDONTWRITEBYTECODE": "1"}
    user = {"user": 65534, "group": 65534, "extra_groups": []}
    for python in (sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
        try:
            probe = subprocess.run(
                [python, "-c", "import lmtrain.types"], env=env, capture_output=True, cwd="/", **user
            )
        except OSError:
            continue
        if probe.returncode == 0:
            break
    else:
        pytest.skip("no interpreter that an ordinary user can read")
    done = subprocess.run([python, "-c", ORDINARY], env=env, capture_output=True, text=True, cwd="/", **user)
    assert "HELD" in done.stdout, done.stderr


@pytest.mark.parametrize("field", ["seconds", "cpu_seconds", "memory", "file_size", "disk", "output"])
def test_limits_that_cannot_be_are_refused(field):
    for value in (-1, "1", None, float("nan"), 2.5 if field != "seconds" else -0.5):
        with pytest.raises(LmtrainError, match=field):
            sandbox.Limits(**{field: value})
    with pytest.raises(LmtrainError, match="entry_point"):
        sandbox.check("", "", "f(1)")
