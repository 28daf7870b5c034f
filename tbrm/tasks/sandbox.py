"""The rights of a process that grades responses, given up once it has imported what it needs.

A response is text from a model: should one get past a grader's own guard and run code, that code can compute, and no more.
Everywhere: no environment and an empty folder to stand in (`tbrm.tasks.workers`), no file of more than 0 bytes, no further
process. On Linux, with whatever of these the kernel has, no root or container rights needed:

- seccomp: no sockets but the one to the trainer, no shared memory or queues, no programs, no processes or threads, no
  signals to others, no change of any file.
- Landlock (Linux 5.13 and later): no look at files but those of Python, its packages and the system's libraries.
- All capabilities are dropped, which is what makes root more than a user.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import struct
import sys
from collections.abc import Iterator
from functools import cache

# System calls that are refused, with their numbers on x86_64 and aarch64 (0: it has none).
_REFUSED = """
    socket 41 198, socketpair 53 199, connect 42 203, bind 49 200, sendto 44 206, sendmsg 46 211, sendmmsg 307 269,
    io_uring_setup 425 425, mq_open 240 180, mq_unlink 241 181,
    shmget 29 194, shmat 30 196, shmctl 31 195, semget 64 190, semop 65 193, semtimedop 220 192, semctl 66 191,
    msgget 68 186, msgsnd 69 189, msgrcv 70 188, msgctl 71 187,
    execve 59 221, execveat 322 281, fork 57 0, vfork 58 0, clone 56 220, clone3 435 435,
    kill 62 129, tkill 200 130, tgkill 234 131, rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240,
    pidfd_open 434 434, pidfd_send_signal 424 424, pidfd_getfd 438 438, prlimit64 302 261,
    ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271, setpriority 141 140,
    sched_setaffinity 203 122, sched_setscheduler 144 119, sched_setparam 142 118, sched_setattr 314 274, ioprio_set 251 30,
    openat2 437 437, open_by_handle_at 304 265, creat 85 0, truncate 76 45, mknod 133 0, mknodat 259 33,
    unlink 87 0, unlinkat 263 35, rename 82 0, renameat 264 38, renameat2 316 276, rmdir 84 0, mkdir 83 0, mkdirat 258 34,
    link 86 0, linkat 265 37, symlink 88 0, symlinkat 266 36, utime 132 0, utimes 235 0, futimesat 261 0, utimensat 280 88,
    chmod 90 0, fchmod 91 52, fchmodat 268 53, fchmodat2 452 452, chown 92 0, fchown 93 55, lchown 94 0, fchownat 260 54,
    setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7, removexattr 197 14, lremovexattr 198 15, fremovexattr 199 16,
    setxattrat 463 463, removexattrat 466 466, file_setattr 469 469,
    mount 165 40, umount2 166 39, unshare 272 97, setns 308 268, chroot 161 51, pivot_root 155 41, bpf 321 280,
    keyctl 250 219, add_key 248 217, request_key 249 218, perf_event_open 298 241, userfaultfd 323 282
"""
_MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h
_EQUAL, _ANY_BIT = 0x15, 0x45  # linux/bpf_common.h
_TO_WRITE = [os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC]
# F_SETOWN, F_SETSIG, F_SETOWN_EX and FIOSETOWN, SIOCSPGRP: data in our socket would be a signal to another process.
# FS_IOC_SETFLAGS, FS_IOC_FSSETXATTR: they change files that are open for reading.
_OF_FILES = [8, 10, 15]
_OF_DEVICES = [0x8901, 0x8902, 0x40086602, 0x401C5820]
# Those that are refused by an argument: number, argument, comparison, values.
_BY_ARGUMENT = {
    "x86_64": [
        (2, 1, _ANY_BIT, _TO_WRITE),  # open
        (257, 2, _ANY_BIT, _TO_WRITE),  # openat
        (72, 1, _EQUAL, _OF_FILES),  # fcntl
        (16, 1, _EQUAL, _OF_DEVICES),  # ioctl
    ],
    "aarch64": [
        (56, 2, _ANY_BIT, _TO_WRITE),
        (25, 1, _EQUAL, _OF_FILES),
        (29, 1, _EQUAL, _OF_DEVICES),
    ],
}

_SYSTEM = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo", "/etc/ld.so.cache",
           "/etc/localtime", "/dev/null", "/dev/urandom")  # fmt: skip


@cache
def confine() -> list[str]:
    """Gives the rights up, for good. Returns what this machine does not let us give up, and what for."""
    os.dup2(1, 2)  # standard output is /dev/null; the terminal or log of the trainer is not for graders
    sys.dont_write_bytecode = True
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC):
        resource.setrlimit(limit, (0, 0))
    if sys.platform != "linux":
        return [
            f"{platform.system()}: no seccomp and no Landlock, so graders may use the network, and your files as you may"
        ]
    steps = {
        "no capabilities": (_drop_capabilities, "graders may do what root may"),
        "Landlock": (_hide_files, "graders may read your files"),
        "seccomp": (_refuse_calls, "graders may use the network, and change your files"),
    }
    missing = []
    for name, (step, otherwise) in steps.items():
        try:
            step()
        except OSError as error:
            missing.append(f"{name}: {error.strerror}: {otherwise}")
    return missing


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _drop_capabilities() -> None:
    _checked(_libc().prctl(38, 1, 0, 0, 0))  # PR_SET_NO_NEW_PRIVS, which the other two want as well
    version = struct.pack("Ii", 0x20080522, 0)
    _checked(_libc().capset(version, bytes(24)))


def _hide_files() -> None:
    """Landlock: see linux/landlock.h. What is handled and that no rule allows is refused."""
    create, add_rule, restrict = 444, 445, 446
    read_file, read_folder = 1 << 2, 1 << 3

    def call(number: int, *arguments: bytes | int | None) -> int:
        words = (a if isinstance(a, bytes | None) else ctypes.c_long(a) for a in arguments)
        return _checked(_libc().syscall(ctypes.c_long(number), *words))

    version = call(create, None, 0, 1)
    files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1  # all kinds of access that it knows
    handled = [files, 0b11 if version >= 4 else 0, 0b11 if version >= 6 else 0]  # TCP; signals and abstract sockets
    attributes = struct.pack("QQQ", *handled)[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = call(create, attributes, len(attributes), 0)
    for path in _readable():
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:  # it is not there
            continue
        allowed = read_file | read_folder if os.path.isdir(path) else read_file
        call(add_rule, rules, 1, struct.pack("=Qi", allowed, place), 0)
        os.close(place)
    call(restrict, rules, 0)
    os.close(rules)


def _readable() -> Iterator[str]:
    """Python, installed packages, and of other folders on the path what was imported: they may hold anything else."""
    yield from (*_SYSTEM, sys.prefix, sys.base_prefix, sys.exec_prefix, os.getcwd())
    yield from (path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages"))
    for name, module in list(sys.modules.items()):
        if "." not in name and (file := getattr(module, "__file__", None)):
            yield os.path.dirname(file) if hasattr(module, "__path__") else file


def _refuse_calls() -> None:
    """seccomp: a program that looks at the number of each system call. See linux/seccomp.h and linux/bpf_common.h."""
    load, at_least, give = 0x20, 0x35, 0x06
    machine = platform.machine()
    if machine not in _MACHINES or sys.maxsize < 2**32:
        raise OSError(errno.ENOSYS, f"not known on {machine}")
    allow, refuse = (
        struct.pack("HBBI", give, 0, 0, 0x7FFF0000),
        struct.pack("HBBI", give, 0, 0, 0x00050000 | errno.EPERM),
    )

    def unless(code: int, value: int) -> bytes:
        """Refuses where the comparison holds."""
        return struct.pack("HBBI", code, 0, 1, value) + refuse

    def number() -> bytes:
        return struct.pack("HBBI", load, 0, 0, 0)

    program = struct.pack("HBBI", load, 0, 0, 4) + struct.pack("HBBI", _EQUAL, 1, 0, _MACHINES[machine]) + refuse
    program += number() + unless(at_least, 0x40000000)  # those of x32 programs
    for refused in refused_calls(machine).values():
        program += unless(_EQUAL, refused)
    for called, argument, comparison, values in _BY_ARGUMENT[machine]:
        look = struct.pack("HBBI", load, 0, 0, 16 + 8 * argument)
        look += b"".join(unless(comparison, value) for value in values) + number()
        program += struct.pack("HBBI", _EQUAL, 0, len(look) // 8, called) + look
    program += allow
    buffer = ctypes.create_string_buffer(program)
    filter_ = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    _checked(_libc().prctl(22, 2, filter_, 0, 0))  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def refused_calls(machine: str) -> dict[str, int]:
    """The number of each refused system call that there is."""
    rows = [row.split() for row in _REFUSED.split(",")]
    numbers = {name: int(x86 if machine == "x86_64" else arm) for name, x86, arm in rows}
    return {name: number for name, number in numbers.items() if number}
