"""Rego in an OPA server: every question goes there, and while it cannot be reached everything is denied.

`decide` is synchronous, so the proxy first awaits `prepare`: it runs the decision, sees which answer was missing, asks the server
for it, and runs the decision again, until none is missing (a connection is one question, a request a second). The answers are a
pure function of the module and the input, hence they may be kept.

The module is pushed when the server is first reached, whenever it comes back, and when it has lost it. Its package carries a
digest of its text, so that supervisors of several versions share one server and never each other's rules.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

from openshell_supervisor.verdict.cache import Lru
from openshell_supervisor.verdict.engines.embedded import PACKAGE, shipped_rules
from openshell_supervisor.verdict.engines.protocol import EngineError, EngineUnavailable, Rules

if TYPE_CHECKING:
    from openshell_supervisor.verdict.engines.opa_client import OpaAddress, OpaClient

TIMEOUT = 1.0
"""Seconds for a question, a push or a health check (issue 4). An answer of a server beside us takes some milliseconds."""
HEALTH_INTERVAL = 1.0
"""Seconds between health checks. For so long, and the check's own second, remembered verdicts hold after the server died."""
RETRY_INTERVAL = 0.25
"""Seconds between attempts while it is away; also how soon after its return decisions are made again."""
ROUNDS = 8
"""Questions that one decision may lead to, one after the other; it takes two (connection, request), custom rules some more."""
PREPARED = 1024
"""Answers kept, each a few hundred bytes. They need only outlive the moment between `prepare` and `decide`."""

_OUTAGE_STATUS = frozenset({401, 403, 404, 407, 429, 502, 503, 504})
"""Answers that say nothing about the question: the token, a wrong path or something in between refused it (RFC 9110)."""


def shipped(module: str | None = None) -> Rules:
    """The rules that come with the supervisor (or this text of them), in a package named after their text."""
    module = shipped_rules() if module is None else module
    mark = f"r{hashlib.sha256(module.encode()).hexdigest()[:16]}"
    head = f"package {PACKAGE.replace('/', '.')}"
    return Rules(module.replace(f"{head}\n", f"{head}.{mark}\n", 1), f"{PACKAGE}/{mark}", f"openshell-sandbox-{mark}")


class OpaServerEngine:
    """The server at `address`, for one event loop. Used as an asynchronous context: outside of it there is an outage.

    `told` is called with the reason when an outage begins (also when there was no server at the start), once, and with an empty
    string when it ends.
    """

    def __init__(
        self, address: OpaAddress, rules: Rules | None = None, told: Callable[[str], None] = lambda reason: None
    ) -> None:
        self.address = address
        self.rules = rules if rules is not None else shipped()
        self._told = told
        self._outage = "the OPA server has not been asked yet"
        self._announced = ""
        self._client: OpaClient | None = None
        self._prepared: Lru[bytes, Any] = Lru(PREPARED)
        self._missing: list[tuple[str, str]] = []
        self._checking = asyncio.Event()
        self._watch: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Reach the server, or begin with an outage; from now on it is watched. Raises nothing of the server's."""
        await self._check()
        self._watch = asyncio.create_task(self._watched(), name="OPA server")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        self._outage = "the OPA server is no longer asked"
        await self._hang_up()

    @property
    def outage(self) -> str:
        """Why nothing can be decided now, or an empty string."""
        return self._outage

    def ask(self, rule: str, document: str) -> Any:
        """The prepared value of `rule`. Raises `EngineUnavailable` where there is none, `EngineError` where it is undefined."""
        if self._outage:
            raise EngineUnavailable(self._outage)
        known = self._prepared.get(_key(rule, document))
        if known is None:
            self._missing.append((rule, document))
            raise EngineUnavailable(f"the OPA server gave no answer within {TIMEOUT:g} s")
        if isinstance(known, EngineError):
            raise known
        return known

    async def prepare(self, decide: Callable[[], object]) -> None:
        """Run `decide` until no answer is missing. A question that fails stays missing, and so ends in a denial."""
        for _ in range(ROUNDS):
            if self._outage:
                return
            self._missing = []
            decide()
            missing, self._missing = self._missing, []
            if not missing:
                return
            answered = await asyncio.gather(*(self._fetch(rule, document) for rule, document in missing))
            if not all(answered):
                return

    async def _fetch(self, rule: str, document: str) -> bool:
        """Ask the server; True when it is known what `ask` will say."""
        from openshell_supervisor.verdict.engines import opa_client

        try:
            async with asyncio.timeout(TIMEOUT):
                found = await self._answer(rule, document)
        except TimeoutError:  # this question may be a heavy one: the next check says whether the server is there
            self._checking.set()
            return False
        except opa_client.Refused as error:
            if error.status in _OUTAGE_STATUS:
                await self._lost(error)
                return False
            self._prepared.put(_key(rule, document), EngineError(f"{rule}: {error}"))
            return True
        except opa_client.TRANSPORT_ERRORS as error:
            await self._lost(error)
            return False
        value = found.get("result")
        self._prepared.put(_key(rule, document), EngineError(f"{rule} is undefined") if value is None else value)
        return True

    async def _answer(self, rule: str, document: str) -> dict[str, Any]:
        from openshell_supervisor.verdict.engines import opa_client

        client = self._client
        if client is None:
            raise OSError("there is no connection")
        try:
            found = await client.answer(self.rules.package, rule, document)
        except opa_client.STALE:
            found = await client.answer(self.rules.package, rule, document)
        if "result" not in found and "result" not in await client.answer(self.rules.package, *self.rules.probe):
            await self._push(client)  # the server was started anew between two checks
            found = await client.answer(self.rules.package, rule, document)
        return found

    async def _watched(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RETRY_INTERVAL if self._outage else HEALTH_INTERVAL):
                    await self._checking.wait()
            self._checking.clear()
            await self._check()

    async def _check(self) -> None:
        """Is the server well? Reach it first, where it was not."""
        from openshell_supervisor.verdict.engines import opa_client

        try:
            async with asyncio.timeout(TIMEOUT):
                if self._client is None:
                    await self._connect()
                else:
                    await self._client.health()
        except (*opa_client.TRANSPORT_ERRORS, opa_client.RegoParseError) as error:
            await self._lost(error)
        else:
            self._outage = ""
            if self._announced:
                self._announced = ""
                self._told("")

    async def _connect(self) -> None:
        from openshell_supervisor.verdict.engines.opa_client import OpaClient, Refused

        client = OpaClient(self.address, TIMEOUT)  # the token is read anew: it may have been the reason
        await client.__aenter__()
        try:
            await client.health()
            await self._push(client)
            if "result" not in await client.answer(self.rules.package, *self.rules.probe):
                raise Refused(200, "the rules were taken and are not there")
        except BaseException:
            await client.close_connection()
            raise
        self._client = client

    async def _push(self, client: OpaClient) -> None:
        for key, value in self.rules.data.items():
            await client.put_data(key, value)
        await client.push(self.rules.module, self.rules.name)

    async def _lost(self, error: Exception) -> None:
        self._outage = f"the OPA server cannot be asked: {_said(error)}"
        if not self._announced:
            self._announced = self._outage
            self._told(self._outage)
        await self._hang_up()

    async def _hang_up(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close_connection()


def _key(rule: str, document: str) -> bytes:
    return hashlib.sha256(f"{rule}\0{document}".encode()).digest()


def _said(error: Exception) -> str:
    """What went wrong in one line: type and text, never a token (none of these carries a header)."""
    if isinstance(error, TimeoutError):
        return f"no answer within {TIMEOUT:g} s"
    text = " ".join(str(error if getattr(error, "errors", None) else getattr(error, "message", "") or error).split())
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__
