"""A process to ask what may crash, hang or leave the GPU unusable: that costs an answer, and nothing else."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing import Pipe
from typing import Any

Answer = dict[str, Any]
_GRACE = 5.0  # seconds to be gone in, after a kill


class Worker:
    """A command that is given the number of a connection, over which it answers each request.

    Who answers "wrong" is not asked again: the next request goes to a new process, which nobody has harmed.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: Sequence[object], seconds: float) -> Answer | None:
        """The answer; {"wrong": how it died} where the process dies, None where it takes longer."""
        process = self._process = self._process or self._start()
        try:
            self._connection.send(request)
            answer = self._connection.recv() if self._connection.poll(seconds) else None
        except (EOFError, OSError):
            answer = {"wrong": self._cause_of_death(process)}
        if answer is None or "wrong" in answer:
            self.stop()
        return answer

    def stop(self) -> None:
        """Kills the process and what it has started: a compiler, say."""
        process, self._process = self._process, None
        if process is not None:
            self._connection.close()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)

    def _start(self) -> subprocess.Popen[bytes]:
        # it finds what this process would import, and nothing that happens to lie in the current folder
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self._connection, there = Pipe()
        self._said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (as long as the process)
        with there:
            return subprocess.Popen(
                [*self._command, str(there.fileno())],
                pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._said,
                stderr=self._said,
                env={**os.environ, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1"},
                start_new_session=True,
            )

    def _cause_of_death(self, process: subprocess.Popen[bytes]) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
        code = process.returncode
        if code is not None and code < 0:
            return f"its process died of {signal.Signals(-code).name}"
        self._said.seek(0)
        return ": ".join([f"its process ended with status {code}", *self._said.read().strip().splitlines()[-1:]])
