"""What locks a process in: limits, no privileges, a list of paths (Landlock), a list of system calls (seccomp).

Runs inside the process that it locks, before anything untrusted is read; imports nothing of lmtrain. None of it needs
root, and all of it holds for root. Two layers carry the promise and both must stand, or `enter` refuses:

    Landlock   which files: the Python runtime and the system's libraries to read, one folder to read and write. The
               folder is flat, and what is written stays: no folders, links, renames or deletions, so that whoever
               watches it sees all that the process keeps on the disk.
    seccomp    which system calls: those below, all others fail with EPERM. None starts a process or a thread, opens a
               socket, reaches another process, changes a file's name, mode or owner, or maps memory outside the limit.

Being a single thread that cannot multiply, the process has nothing that outlives a SIGKILL. Not hidden: that a file
exists, and its size (stat). Namespaces would hide it, but many hosts forbid them, and nothing here would lean on them.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import sys

# name: number on x86_64, number on aarch64 (0 where that machine has none)
_FREE = """
read 0 63 write 1 64 close 3 57 stat 4 0 fstat 5 80 lstat 6 0 poll 7 0 lseek 8 62 mmap 9 222 mprotect 10 226
munmap 11 215 brk 12 214 rt_sigaction 13 134 rt_sigprocmask 14 135 rt_sigreturn 15 139 pread64 17 67 pwrite64 18 68
readv 19 65 writev 20 66 access 21 0 pipe 22 0 select 23 0 sched_yield 24 124 mremap 25 216 msync 26 227
madvise 28 233 dup 32 23 dup2 33 0 pause 34 0 nanosleep 35 101 getitimer 36 102 alarm 37 0 setitimer 38 103
getpid 39 172 recvfrom 45 207 exit 60 93 wait4 61 260 uname 63 160 fsync 74 82 fdatasync 75 83 ftruncate 77 46
getcwd 79 17 chdir 80 49 fchdir 81 50 readlink 89 0 umask 95 166 gettimeofday 96 169 getrlimit 97 163
getrusage 98 165 sysinfo 99 179 times 100 153 getuid 102 174 getgid 104 176 geteuid 107 175 getegid 108 177
getppid 110 173 getpgrp 111 0 getgroups 115 158 getresuid 118 148 getresgid 120 150 getpgid 121 155 getsid 124 156
rt_sigpending 127 136 rt_sigtimedwait 128 137 rt_sigsuspend 130 133 sigaltstack 131 132 statfs 137 43 fstatfs 138 44
gettid 186 178 time 201 0 futex 202 98 sched_getaffinity 204 123 epoll_create 213 0 getdents64 217 61
set_tid_address 218 96 restart_syscall 219 128 fadvise64 221 223 clock_gettime 228 113 clock_getres 229 114
clock_nanosleep 230 115 exit_group 231 94 epoll_wait 232 0 epoll_ctl 233 21 waitid 247 95 newfstatat 262 79
readlinkat 267 78 faccessat 269 48 pselect6 270 72 ppoll 271 73 set_robust_list 273 99 epoll_pwait 281 22
eventfd2 290 19 epoll_create1 291 20 dup3 292 24 pipe2 293 59 getcpu 309 168 getrandom 318 278 membarrier 324 283
statx 332 291 rseq 334 293 close_range 436 436 faccessat2 439 439
"""
# Calls allowed with some arguments only: [(which argument, mask, values, must it be one of them?), ...], all must hold.
_LOW = 0xFFFFFFFF
_ARGUED: dict[str, tuple[tuple[int, int], list]] = {
    # No nameless file (O_TMPFILE), which nobody could count; no O_RDONLY|O_TRUNC, which Landlock before its third
    # version takes for reading.
    "openat": ((257, 56), [(2, 0o20000000, [0o20000000], False), (2, os.O_TRUNC | os.O_ACCMODE, [os.O_TRUNC], False)]),
    # Not F_SETOWN, F_SETSIG, F_SETLEASE, F_NOTIFY, which have the kernel send signals to others.
    "fcntl": ((72, 25), [(1, _LOW, [0, 1, 2, 3, 4, 5, 6, 7, 1030], True)]),
    # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX; not TIOCSTI, FIOSETOWN.
    "ioctl": ((16, 29), [(1, _LOW, [0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451], True)]),
    "kill": ((62, 129), [(0, _LOW, ["self"], True)]),
    "tgkill": ((234, 131), [(0, _LOW, ["self"], True)]),
    "prlimit64": ((302, 261), [(0, _LOW, [0, "self"], True)]),
    # A pair of streams connected to each other, which asyncio needs; sendto without an address.
    "socketpair": ((53, 199), [(0, _LOW, [1], True), (1, 0xF, [1], True)]),
    "sendto": ((44, 206), [(4, _LOW, [0], True), (4.5, _LOW, [0], True)]),
}
_CLONE3 = (435, 435)  # "no such call", so that the C library falls back to clone, which is refused
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_READ_FILE, _READ_DIR, _WRITE_FILE, _MAKE_REG, _TRUNCATE = 1 << 2, 1 << 3, 1 << 1, 1 << 8, 1 << 14
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo", "/dev/urandom")


class Refused(Exception):
    """This machine cannot give the promise; says what is missing."""


def enter(*, parent: int, folder: str, memory: int, cpu_seconds: int, file_size: int) -> None:
    """Locks the calling process in, for good.

    Args:
      parent: process id; when it dies, this process is killed.
      folder: the one folder that may be written; "": none.
      memory: bytes of address space. cpu_seconds: whole seconds. file_size: bytes of each file.

    Raises:
      Refused: a layer is missing, or does not hold.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    _call("PR_SET_PDEATHSIG", libc.prctl(1, signal.SIGKILL, 0, 0, 0))
    if os.getppid() != parent:
        os._exit(1)  # it died before the line above
    try:  # where memory runs short, this goes first, not the trainer
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:
        pass
    limits = {"AS": memory, "CPU": cpu_seconds, "FSIZE": file_size, "NOFILE": 64, "CORE": 0, "NPROC": 0, "MEMLOCK": 0}
    for name, most in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    _call("PR_SET_NO_NEW_PRIVS", libc.prctl(38, 1, 0, 0, 0))
    none = (ctypes.c_uint32 * 6)()
    _call("capset", libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), none))
    _landlock(libc, folder)
    _seccomp(libc)
    _verify(libc)


def _call(name: str, result: int) -> int:
    if result < 0:
        raise Refused(f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


# ---------------------------------------------------------------- files


def _landlock(libc: ctypes.CDLL, folder: str) -> None:
    """Allows reading of the runtime, and reading and writing of `folder`; all other files are closed."""
    version = libc.syscall(444, None, ctypes.c_size_t(0), 1)
    if version < 1:
        raise Refused("Landlock, which Linux has from 5.13 on where it is built with it and started with lsm=landlock")
    rights = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    size = 8 if version < 4 else 16 if version < 6 else 24
    handled = struct.pack("=QQQ", rights, 0b11, 0b11)[:size]  # and no TCP, no abstract sockets, no signals out
    ruleset = _call("landlock_create_ruleset", libc.syscall(444, handled, ctypes.c_size_t(size), 0))
    for path, wanted in _paths(folder):
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # this machine has no such library folder
        rule = struct.pack("=Qi", wanted & rights, fd)
        _call(f"landlock_add_rule {path}", libc.syscall(445, ruleset, 1, rule, 0))
        os.close(fd)
    _call("landlock_restrict_self", libc.syscall(446, ruleset, 0))
    os.close(ruleset)


def _paths(folder: str) -> list[tuple[str, int]]:
    """(path, rights) of all that stays open. Installed packages are not part of it: there is the standard library."""
    found = [(path, _READ_FILE) for path in _LIBRARIES] + [("/dev/null", _READ_FILE | _WRITE_FILE)]
    for entry in sys.path:  # the standard library, its zip, its extension modules (-S: nothing else)
        if os.path.isdir(entry):
            found += [(entry, _READ_DIR)]  # names; what lies in site-packages can be listed, not read
            found += [
                (os.path.join(entry, name), _READ_FILE)
                for name in os.listdir(entry)
                if name not in ("site-packages", "dist-packages")
            ]
        elif os.path.isfile(entry):
            found += [(entry, _READ_FILE)]
    libraries = os.path.join(sys.base_prefix, "lib")
    if os.path.isdir(libraries):  # where Python brings its own, as conda does
        found += [(os.path.join(libraries, name), _READ_FILE) for name in os.listdir(libraries) if ".so" in name]
    if folder:
        found += [(folder, _READ_FILE | _READ_DIR | _WRITE_FILE | _MAKE_REG | _TRUNCATE)]
    return found


# ---------------------------------------------------------------- system calls


def _seccomp(libc: ctypes.CDLL) -> None:
    code = _filter(os.uname().machine, os.getpid())
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    _call("seccomp", libc.prctl(22, 2, program, 0, 0))


def numbers(machine: str) -> dict[str, int]:
    """System calls by name that are allowed, with any argument or with some."""
    if machine not in _MACHINES:
        raise Refused(f"a table of system calls for {machine}; there are {' and '.join(_MACHINES)}")
    which = _MACHINES[machine][0]
    words = _FREE.split()
    free = {words[i]: int(words[i + 1 + which]) for i in range(0, len(words), 3)}
    argued = {name: both[which] for name, (both, _) in _ARGUED.items()}
    return {name: number for name, number in (free | argued).items() if number or name == "read"}


def _filter(machine: str, pid: int) -> bytes:
    """The classic BPF program: struct sock_filter, 8 bytes each. A later match never overrides an earlier one."""
    table = numbers(machine)
    which, arch = _MACHINES[machine]
    load, equal, both, jump, end = 0x20, 0x15, 0x54, 0x05, 0x06
    allow, deny, nosys = 0x7FFF0000, 0x00050000 | 1, 0x00050000 | 38  # SECCOMP_RET_ALLOW, _ERRNO | EPERM, | ENOSYS
    code = [(load, 0, 0, 4), (equal, 1, 0, arch), (end, 0, 0, 0x80000000), (load, 0, 0, 0)]  # another arch: killed
    for name, number in table.items():
        if name not in _ARGUED:
            code += [(equal, 0, 1, number), (end, 0, 0, allow)]
    code += [(equal, 0, 1, _CLONE3[which]), (end, 0, 0, nosys)]
    for number_of, rule in _ARGUED.values():
        body = []
        for argument, mask, values, wanted in rule:
            body += [(load, 0, 0, 16 + int(8 * argument)), (both, 0, 0, mask)]  # 4.5: the upper half of argument 4
            for i, value in enumerate(values):  # a match jumps over the rest of the list, and over the line after it
                body += [(equal, len(values) - i, 0, pid if value == "self" else value)]
            body += [(end, 0, 0, deny)] if wanted else [(jump, 0, 0, 1), (end, 0, 0, deny)]
        body += [(end, 0, 0, allow)]
        code += [(equal, 0, len(body), number_of[which]), *body]
    code += [(end, 0, 0, deny)]
    return b"".join(struct.pack("HBBI", *line) for line in code)


def _verify(libc: ctypes.CDLL) -> None:
    """Tries the doors: a layer that was accepted but does nothing (an emulated kernel) is found here."""
    for path in ("/", "/proc/self/environ", "/etc/passwd"):
        try:
            os.close(os.open(path, os.O_RDONLY))
        except OSError:
            continue
        raise Refused(f"Landlock that holds: {path} can still be read")
    if libc.socket(2, 1, 0) >= 0:
        raise Refused("a seccomp that holds: sockets still open")
    try:
        if os.fork() == 0:
            os._exit(0)
    except OSError:
        return
    raise Refused("a seccomp that holds: processes still start")
