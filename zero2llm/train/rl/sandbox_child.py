"""Inside the sandbox: give up what a process may do, then run the answer's file, and say what came of it.

    python sandbox_child.py program|check|probe SECONDS MEGABYTES PARENT        in a folder with answer.py and, for check, check.py

    program   answer.py as a program: what it prints is the result
    check     answer.py as a module, then check.py behind it in the same names; printed: the line on standard input (a nonce), and
              repr(value), if check.py gives one
    probe     prints which of the protections hold

This file runs in a process of its own and imports nothing of zero2llm; Python's own runpy runs the two files.
limits     CPU seconds, address space, no file of any size, no process or thread, 16 open files, no core dump; dies with its parent
landlock   (Linux 5.13) reads nothing but Python's own library, system libraries and its folder; writes nothing
seccomp    (Linux on x86-64 and arm64) only the calls of SYSCALLS, and open for reading: no network, process, signal, write, or change
           of a file's mode
Source: landlock(7), seccomp(2); numbers from the kernel's tables. The last two need no privileges.
"""

import ctypes
import os
import platform
import resource
import runpy
import signal
import struct
import sys

SYSCALLS = {  # name: (x86-64, arm64), what an interpreter needs to compute, read modules and print
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "stat": (4, None), "fstat": (5, 80), "lstat": (6, None), "lseek": (8, 62),
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "pread64": (17, 67), "readv": (19, 65), "writev": (20, 66),
    "access": (21, None), "sched_yield": (24, 124), "mremap": (25, 216), "madvise": (28, 233), "nanosleep": (35, 101),
    "getpid": (39, 172), "exit": (60, 93), "uname": (63, 160), "getcwd": (79, 17), "readlink": (89, None),
    "gettimeofday": (96, 169), "getrusage": (98, 165), "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176),
    "geteuid": (107, 175), "getegid": (108, 177), "getppid": (110, 173), "sigaltstack": (131, 132), "gettid": (186, 178),
    "time": (201, None), "futex": (202, 98), "getdents64": (217, 61), "restart_syscall": (219, 128), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "exit_group": (231, 94), "newfstatat": (262, 79),
    "readlinkat": (267, 78), "faccessat": (269, 48), "getrandom": (318, 278), "statx": (332, 291), "faccessat2": (439, 439),
}  # fmt: skip
OPEN, OPENAT = (2, None), (257, 56)
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the table, AUDIT_ARCH
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
ALLOW, DENY = 0x7FFF0000, 0x00050001  # SECCOMP_RET_ALLOW; SECCOMP_RET_ERRNO | EPERM
READ_FILE, READ_DIR = 1 << 2, 1 << 3
DEATH_SIGNAL, NO_NEW_PRIVILEGES, SECCOMP = 1, 38, 22  # of prctl


def limits(seconds: int, megabytes: int) -> bool:
    """False if the system refuses one of them."""
    held = True
    for name, most in (("CPU", seconds), ("AS", megabytes << 20), ("FSIZE", 0), ("NPROC", 0), ("NOFILE", 16), ("CORE", 0)):
        try:
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most + (name == "CPU")))
        except (ValueError, OSError):  # macOS knows no limit of the address space
            held = False
    return held


def landlock(libc: ctypes.CDLL) -> bool:
    abi = libc.syscall(444, None, 0, 1)
    if abi < 1:
        return False
    rights = (1 << (13 if abi < 2 else 14 if abi < 3 else 15 if abi < 5 else 16)) - 1
    attr = struct.pack("Q", rights)
    rules = libc.syscall(444, attr, len(attr), 0)
    places = [os.path.dirname(os.__file__), "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/dev/urandom", os.getcwd()]
    for place in places:
        if os.path.exists(place):
            fd = os.open(place, getattr(os, "O_PATH", 0))
            allowed = READ_FILE | READ_DIR if os.path.isdir(place) else READ_FILE
            libc.syscall(445, rules, 1, struct.pack("=Qi", allowed, fd), 0)
            os.close(fd)
    held = libc.syscall(446, rules, 0) == 0
    os.close(rules)
    return held


def seccomp(libc: ctypes.CDLL) -> bool:
    if platform.machine() not in MACHINES:
        return False
    column, machine = MACHINES[platform.machine()]
    load = lambda offset: struct.pack("HBBI", 0x20, 0, 0, offset)
    give = lambda verdict: struct.pack("HBBI", 0x06, 0, 0, verdict)
    equal = lambda value, skip: struct.pack("HBBI", 0x15, 0, skip, value)  # else: skip so many
    code = [load(4), struct.pack("HBBI", 0x15, 1, 0, machine), give(DENY), load(0)]  # of struct seccomp_data: arch, nr; args from byte 16
    for numbers, argument in ((OPEN, 1), (OPENAT, 2)):
        if numbers[column] is not None:
            code += [equal(numbers[column], 4), load(16 + 8 * argument), struct.pack("HBBI", 0x45, 0, 1, WRITING), give(DENY), give(ALLOW)]
    for numbers in SYSCALLS.values():
        if numbers[column] is not None:
            code += [equal(numbers[column], 1), give(ALLOW)]
    code = b"".join([*code, give(DENY)])
    program = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(program))
    return libc.prctl(SECCOMP, 2, header, 0, 0) == 0


def confine(seconds: int, megabytes: int, parent: int) -> list[str]:
    """Names of the protections that hold."""
    if not sys.platform.startswith("linux"):
        return ["limits"] if limits(seconds, megabytes) else []
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before that
        os._exit(1)
    libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    held = {"landlock": landlock(libc), "limits": limits(seconds, megabytes), "seccomp": seccomp(libc)}
    return [name for name, holds in held.items() if holds]


def plain(value):
    """Subclasses of containers (Counter, namedtuple) as what they are subclasses of: their repr reads back."""
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return (set if kind is frozenset else kind)(map(plain, value))
    return {plain(k): plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def check(out: int) -> None:
    names = runpy.run_path("answer.py", run_name="answer")
    nonce = os.read(0, 64)
    found = runpy.run_path("check.py", init_globals=names, run_name="check")
    os.write(out, nonce + repr(plain(found.get("value_of_the_test"))).encode())


def main() -> None:
    mode, seconds, megabytes, parent = sys.argv[1], *map(int, sys.argv[2:5])
    sys.argv[:], sys.path[:] = ["answer.py"], [place for place in sys.path if place != os.path.dirname(os.path.abspath(__file__))]
    out = os.dup(1)
    if mode == "check":
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
    held = confine(seconds, megabytes, parent)
    if mode == "program":
        os.close(out)
        runpy.run_path("answer.py", run_name="__main__")
    elif mode == "check":
        check(out)
        os._exit(0)
    else:
        os.write(out, " ".join(held).encode())


if __name__ == "__main__":
    main()
