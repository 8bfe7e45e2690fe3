"""Verifies the state of a daemon beside its loop, which goes on folding: reading all of a spool may take minutes.

What is checked is a snapshot, the state of the moment at which it was taken. Copies and
generations that the loop does not need any more go from the state meanwhile, but not
from the snapshot, so that none of them is missed.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hotpixd.backup import snapshot
from hotpixd.feed_server import Question
from hotpixd.store.state import State, StateDamaged, StateError
from hotpixd.views import answers


class _GivenUp(Exception):  # noqa: N818 - a condition, not a fault
    """The daemon stops, and whoever asked has the state itself in a moment; or those who asked have gone."""


class Verifier:
    """Checks a state for those who ask, on a thread of its own; all else is for the thread that has the state.

    Parameters
    ----------
    wake : called when those who asked were answered, from that thread
    """

    def __init__(self, state: State, wake: Callable[[], None]) -> None:
        self._state = state
        self._wake = wake
        self._thread = ThreadPoolExecutor(1, "verify")
        self._running: Future[None] | None = None
        self._stopping = threading.Event()

    @property
    def is_busy(self) -> bool:
        """Whether a snapshot is being checked. Raises what nobody foresaw about the one before."""
        if self._running is not None and self._running.done():
            ended, self._running = self._running, None
            ended.result()
        return self._running is not None

    def begin(self, asked: Sequence[Question]) -> None:
        """Take a snapshot, and have it checked for those who asked; what was folded is best saved before.

        Raises
        ------
        StateError, OSError
            If no snapshot can be taken: nobody is answered then.
        """
        taken = snapshot(self._state, exact=True)
        self._running = self._thread.submit(self._answer, taken, asked)
        self._running.add_done_callback(lambda _: self._wake())

    def close(self) -> None:
        """End, without an answer for those who still wait."""
        self._stopping.set()
        self._thread.shutdown()

    def _answer(self, taken: Path, asked: Sequence[Question]) -> None:
        try:
            answer = self._checked(taken, asked)
        except _GivenUp:
            return
        except (StateError, OSError) as error:
            for question in asked:
                question.refuse(self._named(str(error), taken))
            return
        for question in asked:
            question.answer(answer)

    def _checked(self, taken: Path, asked: Sequence[Question]) -> dict[str, Any]:
        def go_on() -> None:
            if self._stopping.is_set() or all(question.is_gone for question in asked):
                raise _GivenUp

        try:
            with State(taken, create=False) as state:
                # The mark beside the ledger is compared when a state is opened, and so is in no snapshot.
                state.forgotten, state.mark_unusable = self._state.forgotten, self._state.mark_unusable
                answer = answers.verify(state, go_on)
        except StateDamaged as error:
            answer = answers.damaged(error)
        finally:
            shutil.rmtree(taken, ignore_errors=True)
        return {**answer, "problems": [self._named(problem, taken) for problem in answer["problems"]]}

    def _named(self, sentence: str, taken: Path) -> str:
        """Return a sentence about the snapshot as one about the state."""
        return sentence.replace(str(taken), str(self._state.root))
