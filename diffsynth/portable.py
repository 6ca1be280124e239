"""What systems do differently: processes, signals, memory. Nothing else asks which system this is.

Windows has no ``resource`` and no SIGUSR1, and there ``os.kill(number, 0)`` is no question but Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

# Sent by a user: save, and go on. None on Windows, which has no such signal.
SAVE_SIGNAL: signal.Signals | None = getattr(signal, "SIGUSR1", None)
_LARGEST_PROCESS = 2**31 - 1


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
