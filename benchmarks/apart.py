"""A process of its own for what may crash, hang, or be slowed by who else is in the process."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import Any

GRACE = 5.0  # seconds to be gone in, after a kill


class Gone(Exception):
    """Why a process has no answer, as a clause."""


class Worker:
    """Answers with what a generator yields, one after the other, in a process of its own."""

    def __init__(self, function: Callable[..., Iterable[Any]], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, function, arguments), daemon=True)
        self._process.start()
        theirs.close()  # or nobody notices when the other end dies

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join(GRACE)  # what does not go away even so is left behind

    def receive(self, seconds: float) -> Any:
        """The first answer, which nobody has to ask for; raises Gone where there is none, or none in time."""
        if not self._pipe.poll(seconds):
            raise Gone(f"no answer within {seconds:.0f} s")
        try:
            answer, error = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(GRACE)
            raise Gone(f"the process died with exit code {self._process.exitcode}") from None
        if error is not None:
            raise Gone(error)
        return answer

    def ask(self, seconds: float) -> Any:
        """The next answer."""
        with contextlib.suppress(BrokenPipeError):  # of a process that has died: there is no answer either
            self._pipe.send(None)
        return self.receive(seconds)


def _work(pipe: Connection, function: Callable[..., Iterable[Any]], arguments: tuple[Any, ...]) -> None:
    try:
        for answer in function(*arguments):
            pipe.send((answer, None))
            pipe.recv()
    except EOFError:
        return  # nobody waits any more
    except Exception as error:
        pipe.send((None, said(error)))


def said(error: Exception) -> str:
    """An exception in a line."""
    return f"{type(error).__name__}: {error}".strip().split("\n")[0][:300]
