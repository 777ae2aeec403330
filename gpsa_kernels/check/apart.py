"""A process to ask what may crash, hang or leave the GPU unusable: that costs an answer, and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import wait
from typing import Any

Answer = dict[str, Any]
_GRACE = 5.0  # seconds to be gone in, after a kill


class Worker:
    """A command that is given requests, a line of JSON each, and answers each with a line of JSON.

    Who answers "wrong" is not asked again: the next request goes to a new process, which nobody has harmed.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._process: subprocess.Popen[str] | None = None
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed on exit)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._errors.close()

    def ask(self, request: Sequence[object], seconds: float) -> Answer | None:
        """The answer; {"wrong": how it died} where the process dies, None where it takes longer."""
        process = self._process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # of a process that has died, which the end of its output tells
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        if not wait([process.stdout.fileno()], seconds):
            answer: Answer | None = None
        elif (line := process.stdout.readline()).endswith("\n"):
            answer = json.loads(line)
        else:
            answer = {"wrong": self._cause_of_death(process)}
        if answer is None or "wrong" in answer:
            self._stop()
        return answer

    def _start(self) -> subprocess.Popen[str]:
        # it finds what this process would import, and nothing that happens to lie in the current folder
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self._errors.seek(0)
        self._errors.truncate()
        return subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1"},
            start_new_session=True,
        )

    def _stop(self) -> None:
        """Kills the process and what it has started: a compiler, say."""
        if (process := self._process) is None:
            return
        self._process = None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]

    def _cause_of_death(self, process: subprocess.Popen[str]) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
        self._errors.seek(0)
        said = [line.strip() for line in self._errors if line.strip()]
        code = process.returncode
        if code is not None and code < 0:
            return f"its process died of {signal.Signals(-code).name}"
        return f"its process ended with status {code}{': ' if said else ''}{said[-1] if said else ''}"
