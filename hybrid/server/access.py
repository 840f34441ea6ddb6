"""Who is asking: the API key of a request, and what its scopes allow.

Routes are closed by default: the door asks for a key before any route is looked up, so a new route cannot be forgotten.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from dataclasses import dataclass

from starlette.requests import Request

from hybrid.errors import Forbidden, Unauthorized
from hybrid.evaluation.asking import CALLER
from hybrid.keys import Keys, digest

#: answered without a key, whatever is configured
OPEN = frozenset(["/livez", "/readyz"])


@dataclass(frozen=True, slots=True)
class Caller:
    """A tenant: the id of its key, or "local" where no key exists."""

    id: str
    admin: bool


LOCAL = Caller("local", True)
#: the owner's own measuring: its requests are told apart from those of people
MEASURING = Caller(CALLER, True)


class Access:
    """Checks the `Authorization` header. `token` is the server's own admin key (`server.json`); `closed` asks for a
    key even before one exists, which is the rule where strangers can connect."""

    def __init__(self, keys: Keys, *, token: str, closed: bool) -> None:
        self._keys = keys
        self._token = digest(token)
        self._closed = closed

    def caller(self, authorization: bytes | None, purpose: bytes = b"") -> Caller:
        """The tenant that sends this header; of the owner, its `purpose` counts too. Raises Unauthorized."""
        secret = _secret(authorization)
        if secret and hmac.compare_digest(digest(secret), self._token):
            return MEASURING if purpose == CALLER.encode() else LOCAL
        key = self._keys.authenticate(secret)
        if key is not None:
            return Caller(key.id, "admin" in key.scopes)
        if self._closed:
            raise Unauthorized("No API key exists yet and strangers can reach this address: `hybrid keys create`.")
        return LOCAL


def _secret(authorization: bytes | None) -> str | None:
    """The key in a `Bearer` header, or the password in a `Basic` one (what a browser can send)."""
    scheme, _, value = (authorization or b"").decode("latin-1").partition(" ")
    value = value.strip()
    if scheme.lower() == "bearer":
        return value
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode("utf-8").partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return None
    return None


def challenge(path: str) -> dict[str, str]:
    """The header that goes with a 401: a browser that opens the UI is asked for the key as a password."""
    return {"www-authenticate": "Bearer" if path.startswith("/v1/") else 'Basic realm="hybrid (password: an API key)"'}


def caller(request: Request) -> Caller:
    """The tenant the door let in."""
    found: Caller = request.scope["hybrid.caller"]
    return found


def require_admin(request: Request) -> None:
    """Raises Forbidden for a key that may only use what is served."""
    if not caller(request).admin:
        raise Forbidden("This needs a key with the scope `admin`.")
