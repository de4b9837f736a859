"""Asking an engine for several texts and waiting for all of them."""

import queue
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from hildanext.core.errors import HildaError
from hildanext.engine.base import DeadlineExceeded, EngineEvent, Failed, Finished, Request, RequestOutput, Sink, Ticket

SubmitAll = Callable[[Sequence[tuple[Request, Sink]]], Sequence[Ticket]]


def ask_all(submit_all: SubmitAll, requests: Sequence[Request]) -> list[RequestOutput | None]:
    """The answers in the requests' order; None where one was not whole by its deadline.

    Raises the error of a request that failed otherwise, once all others have ended. Whoever interrupts leaves no
    request behind.
    """
    ends: queue.SimpleQueue[tuple[int, RequestOutput | HildaError]] = queue.SimpleQueue()

    def sink(number: int) -> Sink:
        def hear(event: EngineEvent) -> None:
            if isinstance(event, Finished):
                ends.put((number, event.answer))
            elif isinstance(event, Failed):
                ends.put((number, event.error))

        return hear

    outputs: list[RequestOutput | None] = [None] * len(requests)
    failures: list[HildaError] = []
    with ExitStack() as leaving:
        for ticket in submit_all([(request, sink(number)) for number, request in enumerate(requests)]):
            leaving.callback(ticket.cancel)
        for _ in requests:
            number, end = ends.get()
            if isinstance(end, RequestOutput):
                outputs[number] = end
            elif not isinstance(end, DeadlineExceeded):
                failures.append(end)
    if failures:
        raise failures[0]
    return outputs
