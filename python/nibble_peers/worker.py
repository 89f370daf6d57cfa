"""The protocol's side of a worker: lines in, lines out, errors as answers. No library here."""

import json
import os
import sys
import time
import traceback

PROTOCOL = 1
OPERATIONS = ("hello", "prepare", "dequantize", "hold", "check", "run")  # and bye
WAKE_SECONDS = 0.005
WAKE_SIZE = 128  # M, N and K of the small product for wake_threads


class Refusal(Exception):
    """What cannot be done, in words for the person at the tool; no traceback."""


def take_stdout():
    """The answers' stream. Whatever a library prints goes to stderr instead of between them."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


def wake_threads(small_product):
    """Before a timed product: a worker that was stopped finds its threads asleep or crowded on one
    CPU, and the system takes a few milliseconds to spread those that run."""
    end = time.perf_counter() + WAKE_SECONDS
    while time.perf_counter() < end:
        small_product()


def answer(peer, request):
    operation = request.pop("op")
    if operation not in OPERATIONS:
        raise Refusal(f"no operation is named {operation!r}")
    return getattr(peer, operation)(**request)


def serve(make_peer):
    """Answers until `bye` or the end of the input. `make_peer` is called by the first request."""
    answers = take_stdout()
    peer = None
    for line in sys.stdin:
        try:
            request = json.loads(line)
            if request["op"] == "bye":
                return
            if peer is None:
                peer = make_peer()
            reply = answer(peer, request)
        except Refusal as refusal:
            reply = {"error": str(refusal)}
        except Exception as error:  # the tool goes on without this worker and says why
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(reply) + "\n")
