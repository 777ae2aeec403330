"""Runs a command within a time limit, so that nothing of it outlives the limit or whoever asked for it.

``python -m benchmarks.supervisor COMMAND ...`` is what stands between: it leads a session of its own and ends it when
its standard input closes, which is when the process at the other end is gone, killed or not.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TICK = 5.0  # seconds between two calls of ``meanwhile``
GRACE = 5.0  # seconds to stop in after an interrupt, and to be gone in after a kill


def run(
    command: Sequence[str], seconds: float, log: Path, environment: Mapping[str, str], meanwhile: Callable[[], object]
) -> int | None:
    """Adds a command's output to ``log``; returns its exit status, or None where it was ended at its time limit.

    At the limit the command alone is interrupted, as by Ctrl-C, so that it can say what it has; then all that it
    started is killed. A process that even so does not go away is left behind.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.supervisor", *command],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    assert process.stdin is not None
    try:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(min(TICK, left))
            meanwhile()
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return None
    finally:
        process.stdin.close()
        end_session(process.pid)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def end_session(session: int) -> None:
    """Kills every process of a session but the caller; a process group would not do, since ninja makes its own."""
    for _ in range(10):  # a process may start another one while it is being killed
        alive = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _is_alive_in(session, pid)]
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not alive:
            return
        time.sleep(0.05)


def _is_alive_in(session: int, pid: int) -> bool:
    try:
        state, _, _, found, *_ = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return False
    return pid != os.getpid() and state != "Z" and int(found) == session


def main(command: list[str]) -> int:
    """Runs ``command`` as long as the standard input is open; returns its exit status, 128 and more for a signal."""
    if os.getsid(0) != os.getpid():
        raise SystemExit("it would end the session of whoever started it: start it in a session of its own")

    def end_when_abandoned() -> None:
        sys.stdin.buffer.read()
        end_session(os.getpid())
        os._exit(1)

    threading.Thread(target=end_when_abandoned, daemon=True).start()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored, and that is inherited
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    signal.signal(signal.SIGINT, lambda *_: process.send_signal(signal.SIGINT))
    code = process.wait()
    end_session(os.getpid())
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))  # without waiting for the thread
