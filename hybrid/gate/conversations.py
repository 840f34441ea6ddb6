"""Which arm answered earlier in a conversation, so that a follow-up is not sent elsewhere for a hair's breadth.

A conversation is what the caller calls one (`hybrid.session`), or the messages that begin alike: clients of the chat
API send the whole history each time. Kept in memory alone: a restart costs at most one change of arm.
"""

from __future__ import annotations

import collections
import hashlib
import threading

from hybrid.types.arm import Arm
from hybrid.types.request import Request

#: conversations remembered; the one that was silent longest is forgotten first
_MOST = 4096


class Conversations:
    """The arm of each running conversation. Safe to use from several threads."""

    def __init__(self) -> None:
        self._arms: collections.OrderedDict[str, Arm] = collections.OrderedDict()
        self._lock = threading.Lock()

    def arm(self, request: Request) -> Arm | None:
        """The arm that answered earlier in the request's conversation, if there is an earlier turn."""
        begun = request.knobs.session is not None or any(m.role == "assistant" for m in request.messages)
        if not begun:
            return None
        with self._lock:
            return self._arms.get(_name(request))

    def keep(self, request: Request, arm: Arm) -> None:
        """Remembers the arm that answers this turn."""
        with self._lock:
            name = _name(request)
            self._arms[name] = arm
            self._arms.move_to_end(name)
            while len(self._arms) > _MOST:
                self._arms.popitem(last=False)


def _name(request: Request) -> str:
    """A tenant's conversation, without keeping its words."""
    if request.knobs.session is not None:
        parts = ["session", request.knobs.session]
    else:
        first = next((i for i, m in enumerate(request.messages) if m.role == "user"), len(request.messages))
        parts = [f"{m.role}:{m.text}" for m in request.messages[: first + 1]]
    return hashlib.sha256("\0".join((request.caller, *parts)).encode()).hexdigest()
