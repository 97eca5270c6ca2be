"""Rego inside the process: rego-cpp through regopy, compiled once, asked many times.

It evaluates named rules of one module on a JSON input and knows nothing of policies or verdicts. Everything that varies is in the
input, so the compiled module outlives every policy generation and asking leaves nothing behind in the interpreter.

Two properties of regopy 1.5.2 shape it. `Interpreter.set_input(value)` does not escape strings: a query value holding `", "`
comes back as two strings, `\\u0041` as "A", and a NUL cuts. Hence input always goes in as JSON text through `set_input_term`,
which is sound; a test holds both. And the interpreter releases the GIL while it holds state, hence the lock.

Its library brings `operator new` and `delete` of its own (snmalloc). Where something else has loaded libstdc++ before (grpc,
protobuf and aiohttp do), what libstdc++ allocates with malloc is handed to snmalloc to free, which lets it lie: some 40 KiB of
every evaluation. `_one_allocator` is the remedy.
"""

from __future__ import annotations

import ctypes
import json
import os
import threading
from functools import lru_cache
from importlib import resources
from typing import Any

from openshell_supervisor.verdict.engines.protocol import Engine, EngineError

__all__ = ["PACKAGE", "RULES", "EmbeddedEngine", "Engine", "EngineError", "shared_engine", "shipped_rules"]

PACKAGE = "openshell/sandbox"
RULES = ("egress_authorization", "request_authorization")


class EmbeddedEngine:
    """One compiled module, and what it sees under `data`. Its constructor raises `EngineError` when it does not compile."""

    def __init__(self, module: str, rules: tuple[str, ...] = RULES, data: dict[str, Any] | None = None) -> None:
        _one_allocator()
        import regopy  # heavy (a shared library): only when the first decision is near

        self._regopy_error = regopy.RegoError
        self._lock = threading.Lock()
        self._interpreter = regopy.Interpreter()
        self._interpreter.log_level = regopy.LogLevel.NONE  # it writes to our standard output, which is the workload's
        self._rules = frozenset(rules)
        try:
            self._interpreter.add_module("sandbox.rego", module)
            if data is not None:
                self._interpreter.add_data_json(json.dumps(data))
            self._bundle = self._interpreter.build(None, [f"{PACKAGE}/{rule}" for rule in rules])
        except regopy.RegoError as error:
            raise EngineError(f"the rules do not compile: {error}") from error
        if not self._bundle.ok():
            raise EngineError("the rules do not compile")

    def ask(self, rule: str, document: str) -> Any:
        """The value of `rule` for the input `document`. Raises `EngineError`, also when the rule is undefined."""
        if rule not in self._rules:
            raise EngineError(f"{rule} is undefined")
        try:
            with self._lock:
                self._interpreter.set_input_term(document)
                output = self._interpreter.query_bundle_entrypoint(self._bundle, f"{PACKAGE}/{rule}")
            if not output.results or len(output.results[0].expressions) != 1:
                raise EngineError(f"{rule} is undefined")
            return output.results[0].expressions[0]
        except (self._regopy_error, json.JSONDecodeError, UnicodeError, KeyError, IndexError, TypeError) as error:
            raise EngineError(f"{rule}: {type(error).__name__}") from error


def _one_allocator() -> None:
    """Where libstdc++ is loaded, make its `operator new` and `delete` those of whatever is loaded from now on (dlopen(3))."""
    try:
        ctypes.CDLL("libstdc++.so.6", mode=os.RTLD_NOLOAD | os.RTLD_GLOBAL)
    except OSError:
        pass  # not loaded: it comes with regopy's library, and then uses that library's


def shipped_rules() -> str:
    """The text of the Rego module that comes with the supervisor."""
    return resources.files("openshell_supervisor.verdict").joinpath("rego/sandbox.rego").read_text("utf-8")


@lru_cache(maxsize=1)
def shared_engine() -> EmbeddedEngine:
    """The engine with the shipped rules, one per process. Raises `EngineError`."""
    return EmbeddedEngine(shipped_rules())
