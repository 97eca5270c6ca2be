"""What the bodies of all protocols share: the refusal, header values, media types, the limit of what is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Headers = Sequence[tuple[str, str]]
"""Header fields in order; names in lower case."""

DEFAULT_BODY_LIMIT = 65_536
"""Bytes of a body where the policy says nothing, upstream's default (policy.md 1.3)."""


class BodyError(ValueError):
    """A body that is refused before any rule is asked, also under audit; `reason_id` is stable."""

    def __init__(self, reason_id: str, message: str) -> None:
        super().__init__(message)
        self.reason_id = reason_id
        self.message = message


def values(headers: Headers, name: str) -> list[str]:
    """The comma-separated elements of every field called `name`, stripped, without empty ones."""
    return [part.strip() for key, value in headers if key == name for part in value.split(",") if part.strip()]


def media_type(headers: Headers) -> tuple[str, dict[str, str]]:
    """The type of a body in lower case and its parameters; empty where none is said.

    Raises `BodyError` where there are several, since two readers could pick two.
    """
    fields = [value for key, value in headers if key == "content-type"]
    if len(fields) > 1:
        raise BodyError("invalid_body", "request has several Content-Type headers")
    kind, *parameters = (part.strip() for part in (fields[0] if fields else "").split(";"))
    pairs = (part.partition("=") for part in parameters)
    return kind.lower(), {name.strip().lower(): value.strip().strip('"').lower() for name, _, value in pairs}


def refuse_encodings(headers: Headers, what: str) -> None:
    """Refuse a body that is compressed, or text that is not UTF-8: it would be read otherwise than it is judged.

    `what` begins the message. Raises `BodyError("unsupported_content_encoding", ...)`.
    """
    for coding in values(headers, "content-encoding"):
        if coding.lower() != "identity":
            raise BodyError("unsupported_content_encoding", f'{what} content-encoding "{coding}" is not supported')
    kind, parameters = media_type(headers)
    charset = parameters.get("charset", "utf-8")
    if charset not in ("utf-8", "utf8", "us-ascii"):
        raise BodyError("unsupported_content_encoding", f'{what} charset "{charset}" is not supported')
    if kind.startswith("multipart/"):
        raise BodyError(
            "unsupported_content_type", f"{what.removesuffix(' request')} multipart requests are not supported"
        )


def refuse_longer(body: bytes, limit: int, what: str) -> None:
    """Raises `BodyError("body_too_large", ...)` for a body of more than `limit` bytes."""
    if len(body) > limit:
        raise BodyError("body_too_large", f"{what} body exceeds {limit} byte inspection limit")


@dataclass(frozen=True, slots=True)
class Unread:
    """A request of a protocol that nobody parses (sql): it passes as it is, and that was known when it was asked about."""

    protocol: str
    error: str = ""
    graphql: None = None

    def texts(self) -> tuple[str, ...]:
        """Nothing was read."""
        return ()
