"""Which command is the workload: the command line's, the driver's, or a login shell (contract 1.3)."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from typing import Any

from openshell_supervisor.named import refuse

DEFAULT_COMMAND = ("/bin/bash", "-l")  # contract 1.3
MAX_SPEC_BYTES = (
    1024 * 1024
)  # a command line in a variable; execve(2) allows 128 KiB per string, the encoding adds a third


def command(given: Sequence[str], interactive: bool, environment: Mapping[str, str]) -> tuple[tuple[str, ...], bool]:
    """Contract 1.3: argv, else OPENSHELL_MAIN_PROCESS_SPEC, else a login shell on a terminal."""
    words = list(given)
    if words[:1] == ["--"]:
        words = words[1:]
    if words:
        if not words[0]:
            raise refuse("usage", "the command's first word is empty", "name a program after --")
        return tuple(words), interactive
    spec = environment.get("OPENSHELL_MAIN_PROCESS_SPEC")
    if spec:
        return _main_process_spec(spec)
    return DEFAULT_COMMAND, True


def _main_process_spec(text: str) -> tuple[tuple[str, ...], bool]:
    hint = 'the driver writes {"version": 1, "command": ["..."], "tty": false}, plain or as base64url:…'
    name = "OPENSHELL_MAIN_PROCESS_SPEC"
    if len(text) > MAX_SPEC_BYTES:
        raise refuse("main_process_spec", f"{name} is longer than {MAX_SPEC_BYTES} bytes", hint)
    try:
        if text.startswith("base64url:"):
            encoded = text.removeprefix("base64url:")
            text = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)).decode()
        spec: Any = json.loads(text)
    except (ValueError, binascii.Error, RecursionError) as error:
        raise refuse("main_process_spec", f"{name} cannot be decoded: {error}", hint) from None
    command = spec.get("command") if isinstance(spec, dict) else None
    if not isinstance(spec, dict) or spec.get("version") != 1 or not isinstance(command, list) or not command:
        raise refuse("main_process_spec", f"{name} must have version 1 and a non-empty command", hint)
    if not all(isinstance(word, str) for word in command) or not command[0]:
        raise refuse("main_process_spec", f"{name}: every word of the command must be text, the first not empty", hint)
    return tuple(command), spec.get("tty") is True
