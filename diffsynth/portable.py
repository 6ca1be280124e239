"""What systems do differently: processes, signals, locks, memory. Nothing else asks which system this is.

Windows has no ``resource`` and no SIGUSR1, and there ``os.kill(number, 0)`` is no question but Ctrl-C.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

# Sent by a user: save, and go on. None on Windows, which has no such signal.
SAVE_SIGNAL: signal.Signals | None = getattr(signal, "SIGUSR1", None)
_LARGEST_PROCESS = 2**31 - 1
_LOCKED_BYTE = 1 << 30  # on Windows a locked byte cannot be read: far behind what files of ours hold


def is_alive(process: int) -> bool:
    """Whether a process of this machine has this number; True where the system does not tell."""
    if not 0 < process <= _LARGEST_PROCESS:  # 0 and below mean groups of processes
        return False
    if sys.platform == "win32":
        return _is_alive_on_windows(process)
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def start_of(process: int) -> str | None:
    """When the process of this number began, in whatever form the system tells it.

    Returns:
        None when no process has the number, "" when the system does not tell.
    """
    if not 0 < process <= _LARGEST_PROCESS:
        return None
    if sys.platform == "win32":
        return _start_on_windows(process)
    if Path("/proc/self/stat").is_file():
        return _start_on_linux(process)
    command = ["ps", "-o", "lstart=", "-p", str(process)]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
    return told or None


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file for this process; the system unlocks it when it is closed, or the process ends.

    Returns:
        Whether the lock was free, and is ours now; None where there are no locks.
    """
    if sys.platform == "win32":
        import msvcrt

        os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # some network disks have no locks
        return False if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES) else None
    return True


def peak_memory_bytes() -> int | None:
    """The most memory that this process has had; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def kill_with_children(process: subprocess.Popen[bytes]) -> None:
    """End a process that was started with ``start_new_session=True``, and its children, at once."""
    if sys.platform == "win32":
        subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], check=False, capture_output=True)
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _start_on_linux(process: int) -> str | None:
    """Source: proc(5), field 22 of ``stat``, in ticks since the machine was started."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return "" if Path(f"/proc/{process}").exists() else None
    state, *fields = text.rpartition(")")[2].split()  # the name in front may hold blanks and brackets
    return None if state in "ZX" else f"{boot} {fields[18]}"  # a zombie has nothing open any more


def _start_on_windows(process: int) -> str | None:
    import ctypes

    if not _is_alive_on_windows(process):
        return None
    kernel = ctypes.WinDLL("kernel32", use_last_error=True)  # type: ignore[attr-defined, unused-ignore]
    kernel.OpenProcess.restype = ctypes.c_void_p
    handle = ctypes.c_void_p(kernel.OpenProcess(0x1000, False, process))
    times = [ctypes.c_ulonglong() for _ in range(4)]  # FILETIME: made, ended, in the kernel, outside
    told = kernel.GetProcessTimes(handle, *map(ctypes.byref, times))
    kernel.CloseHandle(handle)
    return str(times[0].value) if told else ""


def _is_alive_on_windows(process: int) -> bool:
    import ctypes

    can_be_asked, is_running, is_of_another_user = 0x1000, 259, 5  # of winnt.h, minwinbase.h, winerror.h
    kernel = ctypes.WinDLL("kernel32", use_last_error=True)  # type: ignore[attr-defined, unused-ignore]
    kernel.OpenProcess.restype = ctypes.c_void_p
    handle = kernel.OpenProcess(can_be_asked, False, process)
    if not handle:
        return bool(ctypes.get_last_error() == is_of_another_user)  # type: ignore[attr-defined, unused-ignore]
    code = ctypes.c_ulong()
    kernel.GetExitCodeProcess(ctypes.c_void_p(handle), ctypes.byref(code))
    kernel.CloseHandle(ctypes.c_void_p(handle))
    return code.value == is_running
