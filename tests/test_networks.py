"""Hosts with a network of their own each: namespaces joined by veth, each with its own host name. Needs root. Here a
cable can be pulled, where elsewhere only a process can be killed."""

import contextlib
import os
import pathlib
import subprocess
import sys
import time

import pytest

from tests.several import at_step, cut, environment, finish, losses, same_losses, start, tiny, whole

__all__ = ["tiny", "whole"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="network namespaces need root"),
]
ETC = pathlib.Path("/etc/netns")  # `ip netns exec NAME` puts the files of /etc/netns/NAME over those of /etc


def ip(*words, check=True):
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True)


@pytest.fixture
def hosts():
    """make(n) -> n namespaces lmt0, lmt1, ... at 10.71.0.1, .2, ..., on one switch."""
    made = []

    def make(count):
        names = [f"lmt{os.getpid()}x{i}" for i in range(count)]
        switch = f"lmt{os.getpid()}s"
        try:
            for name in [switch, *names]:
                ip("netns", "add", name)
                made.append(name)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr}")
        ip("-n", switch, "link", "add", "br0", "type", "bridge")
        ip("-n", switch, "link", "set", "br0", "up")
        table = "127.0.0.1 localhost\n" + "".join(f"10.71.0.{i + 1} {name}\n" for i, name in enumerate(names))
        for i, name in enumerate(names):
            (ETC / name).mkdir(parents=True)
            (ETC / name / "hosts").write_text(table)
            ip("-n", name, "link", "set", "lo", "up")
            ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", f"port{i}", "netns", switch)
            ip("-n", switch, "link", "set", f"port{i}", "master", "br0", "up")
            ip("-n", name, "addr", "add", f"10.71.0.{i + 1}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
        return names, switch

    yield make
    for name in made:
        ip("netns", "del", name, check=False)
        with contextlib.suppress(OSError):
            (ETC / name / "hosts").unlink()
            (ETC / name).rmdir()


class Job:
    """A process of the command on each host; looks like a launcher to at_step."""

    def __init__(self, tiny, workdir, names, devices):
        self.pid = os.getpid()
        self.running = []
        for i, name in enumerate(names):
            env = environment(tiny) | {
                "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "XLA_FLAGS": "",
                "LMTRAIN_COORDINATOR": f"{names[0]}:8476", "LMTRAIN_PROCESSES": str(len(names)),
                "LMTRAIN_PROCESS": str(i),
            }  # fmt: skip
            command = f"hostname {name}; exec {sys.executable} -m lmtrain.cli run --config {tiny} --workdir {workdir}"
            argv = ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", command]
            self.running.append(
                subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            )

    def poll(self):
        return next((p.returncode for p in self.running if p.poll() is not None), None)

    def communicate(self, timeout=300):
        return [p.communicate(timeout=timeout)[0] for p in self.running]


@pytest.mark.parametrize("count, devices", [(2, 4), (4, 2)])
def test_hosts_on_a_network_lose_what_one_process_loses(tiny, whole, hosts, tmp_path, count, devices):
    names, _ = hosts(count)
    job = Job(tiny, tmp_path / "run", names, devices)
    said = job.communicate()
    assert [p.returncode for p in job.running] == [0] * count, "\n".join(said)
    assert f"hosts: {count} processes, by LMTRAIN_COORDINATOR, coordinator {names[0]}:8476" in said[0]
    assert same_losses(losses(tmp_path / "run"), losses(whole("1x8")))


def test_a_checkpoint_goes_from_one_machine_to_a_network_and_back(tiny, whole, hosts, tmp_path):
    folder = cut(whole("1x8"), tmp_path / "run", 10)
    said = Job(tiny, folder, hosts(4)[0], 2).communicate()
    assert "going on from step 10" in said[0], "\n".join(said)
    folder = cut(folder, tmp_path / "back", 20)
    assert "going on from step 20" in finish(start(tiny, folder, 2, 4))
    assert same_losses(losses(folder), losses(whole("1x8")))


def test_a_host_whose_cable_is_pulled_is_named_and_all_end(tiny, hosts, tmp_path):
    names, switch = hosts(4)
    job = Job(tiny, tmp_path / "run", names, 1)
    at_step(job, tmp_path / "run", 8)
    ip("-n", switch, "link", "set", "port3", "down")
    begun = time.time()
    said = job.communicate(timeout=60)
    assert time.time() - begun < 20
    assert [p.returncode for p in job.running] == [76] * 4, "\n".join(said)
    for text in said[:3]:
        assert f"process 3 (host {names[3]}," in text and "nothing heard of it" in text, text
    assert f"process 0 (host {names[0]}," in said[3] and "is gone" in said[3]
