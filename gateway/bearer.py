"""Keys in the Authorization header, client addresses, request ids: what a request says about its sender. Pure."""

import re
from typing import Final

from gateway.errors import ApiError

KEY_LENGTH_MAX: Final = 512
ADDRESS_PATTERN: Final = re.compile(r"[\x21-\x7e]{1,128}")  # an account's name: a wallet address, an e-mail, a number
REQUEST_ID_PATTERN: Final = re.compile(r"[A-Za-z0-9_.:/+=-]{1,128}")
IDEMPOTENCY_KEY_PATTERN: Final = re.compile(r"[\x21-\x7e]{1,255}")


def parse_bearer(header: str | None) -> str:
    """The key of `Authorization: Bearer <key>`, the scheme in any case. Raises ApiError 401, without the key in it."""
    if header is None or not header.strip():
        raise ApiError("missing_api_key", "an API key is required: send the header `Authorization: Bearer <key>`")
    scheme, _, key = header.strip().partition(" ")
    key = key.strip()
    if scheme.lower() != "bearer" or not key or len(key) > KEY_LENGTH_MAX or not key.isascii():
        raise ApiError("invalid_api_key", "the Authorization header is not of the form `Bearer <key>`")
    return key


def parse_user_address(header: str | None) -> str:
    """The account that a chat is accounted to. Raises ApiError 400."""
    if header is None or not header.strip():
        raise ApiError("missing_user_address", "the header `X-User-Address` is required", param="X-User-Address")
    address = header.strip()
    if ADDRESS_PATTERN.fullmatch(address) is None:
        raise ApiError(
            "invalid_request",
            "`X-User-Address` must be 1 to 128 printable ASCII characters without spaces",
            param="X-User-Address",
        )
    return address


def parse_idempotency_key(header: str | None) -> str:
    """The key, or "" when the header is absent. Raises ApiError 400."""
    if header is None:
        return ""
    if IDEMPOTENCY_KEY_PATTERN.fullmatch(header.strip()) is None:
        raise ApiError(
            "invalid_request",
            "`Idempotency-Key` must be 1 to 255 printable ASCII characters without spaces",
            param="Idempotency-Key",
        )
    return header.strip()


def request_id(header: str | None, fresh: str) -> str:
    """The client's own id goes out as it came in; one that could break a log line or a header is replaced."""
    return header if header is not None and REQUEST_ID_PATTERN.fullmatch(header) else fresh


def client_address(remote: str | None, forwarded_for: str | None, *, trust_forwarded: bool) -> str:
    """Whom a rate limit counts. Of X-Forwarded-For only the last hop, which the trusted proxy itself wrote."""
    if trust_forwarded and forwarded_for:
        last = forwarded_for.rsplit(",", 1)[-1].strip()
        if ADDRESS_PATTERN.fullmatch(last):
            return last
    return remote or "unknown"
