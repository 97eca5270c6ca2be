"""JSON that every reader reads alike: bounded, UTF-8, no key twice, no constants outside of the standard (RFC 8259).

Readers differ in what they make of a repeated key (first, last, error) and Go's compare keys without regard to case, so either
is refused where a rule could be led astray by it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, NoReturn

MAX_DEPTH = 128
"""Nesting of arrays and objects; serde_json, upstream's reader, stops at 128 too."""
# The end of a string is optional: one without it runs to the end of the text, or every quote in it would be tried anew.
_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)


class JsonError(ValueError):
    """The text is not JSON, or JSON that is not read alike by everyone. The message says which."""


def loads(text: bytes) -> Any:
    """The value of a JSON text in UTF-8 without a byte order mark. Raises `JsonError`; time is linear in the length."""
    try:
        _check_depth(text)
        return json.loads(text.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant)
    except JsonError:
        raise
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise JsonError("not valid JSON") from error


def look_alike(table: dict[str, Any], names: Iterable[str]) -> str:
    """A key that differs from one of `names` in case alone, or an empty string. Readers in Go take it for that name."""
    folded = {name.casefold(): name for name in names}
    return next((key for key in table if folded.get(key.casefold(), key) != key), "")


def _check_depth(text: bytes) -> None:
    depth = 0
    for token in _TOKENS.finditer(text):
        first = token[0][0]
        if first in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise JsonError(f"nested deeper than {MAX_DEPTH} levels")
        elif first in b"]}":
            depth -= 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise JsonError("a key is there twice")
    return table


def _constant(name: str) -> NoReturn:
    raise JsonError(f"{name} is not JSON")
