"""Kills a process just before a chosen system call, with the ``ptrace`` of Linux."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import sys

LIBC = ctypes.CDLL(None, use_errno=True)
TRACEME, SYSCALL, SETOPTIONS, SYSCALL_INFO = 0, 24, 0x4200, 0x420E
CONTINUE = 7
STOP_AT_CALLS, FOLLOW_THREADS, DIE_WITH_TRACER = 1, 8, 1 << 20
ENTRY = 1
"""The value of ``op`` for a process that is stopped before a system call."""
WAIT_FOR_ALL = 0x40000000

CHANGING = {
    "x86_64": {
        *(1, 18, 20, 296, 40, 326),  # write, pwrite64, writev, pwritev, sendfile, copy_file_range
        *(2, 85, 257, 437),  # open, creat, openat, openat2
        *(82, 264, 316),  # rename, renameat, renameat2
        *(83, 84, 87, 258, 263),  # mkdir, rmdir, unlink, mkdirat, unlinkat
        *(86, 88, 265, 266),  # link, symlink, linkat, symlinkat
        *(76, 77, 285),  # truncate, ftruncate, fallocate
        *(74, 75, 162, 277, 306),  # fsync, fdatasync, sync, sync_file_range, syncfs
        *(73, 90, 91, 268),  # flock, chmod, fchmod, fchmodat
    }
}
"""The numbers of the calls that can change a file, a folder or a lock, by the kind of machine."""


class SyscallInfo(ctypes.Structure):
    """``struct ptrace_syscall_info``: the state of a stopped process."""

    _fields_ = [
        ("op", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 3),
        ("arch", ctypes.c_uint32),
        ("instruction_pointer", ctypes.c_uint64),
        ("stack_pointer", ctypes.c_uint64),
        ("number", ctypes.c_uint64),
        ("arguments", ctypes.c_uint64 * 6),
        ("rest", ctypes.c_uint64),
    ]


def ptrace(request, pid, address=0, data=0):
    result = LIBC.ptrace(ctypes.c_long(request), ctypes.c_long(pid), ctypes.c_void_p(address), ctypes.c_void_p(data))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def arm():
    """Called in the traced process: from here on its system calls are counted."""
    os.kill(os.getpid(), signal.SIGSTOP)


def killed_before(function, number, every_call=False):
    """Runs a function in a forked process, and kills it just before a system call.

    Args:
        function: calls :func:`arm` at the point from which calls are counted.
        number: which one of the calls that change something, from 1.
        every_call: counts every system call.

    Returns:
        Whether it was killed; otherwise it has ended without reaching that call.
    """
    pid = os.fork()
    if pid == 0:
        run_traced(function)
    os.waitpid(pid, 0)  # stopped before the function
    ptrace(SETOPTIONS, pid, 0, STOP_AT_CALLS | FOLLOW_THREADS | DIE_WITH_TRACER)
    ptrace(CONTINUE, pid)
    return follow(pid, number, None if every_call else CHANGING.get(platform.machine()))


def run_traced(function):
    ptrace(TRACEME, 0)
    os.kill(os.getpid(), signal.SIGSTOP)
    try:
        function()
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    os._exit(status)


def follow(pid, number, changing):
    """Lets a stopped process and its threads run until it ends, or reaches the call before which it is killed."""
    is_armed, count = False, 0
    while True:
        thread, status = os.waitpid(-1, WAIT_FOR_ALL)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            if thread != pid:
                continue
            assert status == 0, f"the process ended with {status}"
            return False
        reason = os.WSTOPSIG(status)
        if reason == signal.SIGTRAP | 0x80 and is_armed and is_before(thread, changing):
            count += 1
            if count == number:
                os.kill(pid, signal.SIGKILL)
                while os.waitpid(-1, WAIT_FOR_ALL)[0] != pid:
                    pass
                return True
        is_armed = is_armed or (thread == pid and reason == signal.SIGSTOP)
        delivered = reason if reason in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGSEGV) else 0
        ptrace(SYSCALL if is_armed else CONTINUE, thread, 0, delivered)


def is_before(thread, changing):
    """Whether a thread is stopped before a system call that counts."""
    info = SyscallInfo()
    ptrace(SYSCALL_INFO, thread, ctypes.sizeof(info), ctypes.addressof(info))
    return info.op == ENTRY and (changing is None or info.number in changing)


def can_trace():
    """Whether this machine lets a process trace its children."""
    if not sys.platform.startswith("linux"):
        return False
    pid = os.fork()
    if pid == 0:
        try:
            ptrace(TRACEME, 0)
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
