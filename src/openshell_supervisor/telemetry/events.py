"""Say what happened: one method per kind of event, one dict per event, the same fact to every sink.

The rooms above hold a `Telemetry` and tell it facts; they never build an event by hand. Nothing is validated at run
time (the test suite validates every event against the official schema), nothing is decided here, and a sink's trouble
never reaches the caller. Query strings, header values and secrets do not belong in an event; callers pass paths only,
and what looks like a query is cut here as well, because a second fence is cheap.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TypedDict, Unpack

from openshell_supervisor.telemetry import ocsf, wording
from openshell_supervisor.telemetry.ocsf import Context, Endpoint, Process, Severity
from openshell_supervisor.telemetry.shorthand import WOULD_DENY, shorthand

__all__ = ["Context", "Endpoint", "Event", "Process", "Severity", "Sink", "Telemetry", "Traffic"]

type Event = dict[str, Any]

_EXPECTED_DISPOSITION = {"Allowed": "Allowed", "Denied": "Blocked", "Observed": "Logged"}
# OCSF: observed neither at the source nor at the destination, but on the way; 2 is the destination's side, where a
# proxy sits.
_ON_THE_WAY, _AT_DESTINATION = 3, 2


class Sink(Protocol):
    """Where events go. `write` gets the event (not to be changed) and its one-line form without time prefix; it must
    not raise, must not block for long, and may be called from any thread."""

    def write(self, event: Event, line: str) -> None: ...

    def close(self) -> None: ...


class Traffic(TypedDict, total=False):
    """The facts that `network` and `http` share.

    `action` is Allowed, Denied, Observed (let through, would be denied: give the `reason`) or Modified. Left out,
    `disposition` follows from the action (Allowed, Blocked, Logged) and `severity` is Medium for a denial or a
    would-be denial, else Informational. `ok` None writes no status. `policy` and `engine` name the rule that decided
    (`opa`, `l7`, `ssrf`, `tls`, `nftables`, …). `protocol` is the transport, "tcp" or "udp". `observation_point` is an
    OCSF id.
    """

    severity: Severity | None
    ok: bool | None
    action: str | None
    disposition: str | None
    src: Endpoint | None
    dst: Endpoint | None
    actor: Process | None
    policy: str | None
    engine: str | None
    reason: str | None
    protocol: str | None
    observation_point: int | None
    unmapped: Mapping[str, object] | None


class Telemetry:
    """Builds events in the name of one context and hands each to all sinks. Every method returns the event it wrote."""

    def __init__(self, context: Context, sinks: Iterable[Sink] = ()) -> None:
        self._sinks: tuple[Sink, ...] = tuple(sinks)
        self.context = context

    @property
    def context(self) -> Context:
        """Who speaks. Replaceable: events from then on carry the new context."""
        return self._context

    @context.setter
    def context(self, context: Context) -> None:
        self._context = context
        self._envelope = ocsf.Envelope(context)

    def attach(self, sink: Sink) -> None:
        """Let `sink` have every event from now on."""
        self._sinks = (*self._sinks, sink)

    def close(self) -> None:
        """Close all sinks; events after that are built and go nowhere."""
        sinks, self._sinks = self._sinks, ()
        for sink in sinks:
            sink.close()

    def config(
        self,
        state: str,
        message: str,
        *,
        enabled: bool | None = True,
        severity: Severity = Severity.INFORMATIONAL,
        ok: bool | None = True,
        unmapped: Mapping[str, object] | None = None,
        status_code: str | None = None,
        status_detail: str | None = None,
        **fields: object,
    ) -> Event:
        """A control changed state: `CONFIG:<STATE>`. `enabled` True, False, None is OCSF's Enabled, Disabled, Other.

        `fields` are shown at the end of the message as `[key:value …]` in the given order, `error` always last since
        it is free text, and are kept in `unmapped` as well; a field that is None is left out.
        """
        event = self._config(state, wording.with_fields(message, fields), enabled, severity, ok)
        if status_code is not None:
            event["status_code"] = ocsf.clean(status_code)
        if status_detail is not None:
            event["status_detail"] = ocsf.clean(status_detail)
        shown = {key: value for key, value in fields.items() if value is not None}
        return self._emit(event, {**shown, **(unmapped or {})})

    def network(self, activity: str, message: str, **traffic: Unpack[Traffic]) -> Event:
        """A connection, or one refused: `NET:<ACTIVITY>`. `activity` is Open, Close, Reset, Fail, Refuse, Traffic,
        Listen or Other; any other word is written as the name of an Other."""
        event = self._traffic(ocsf.NETWORK, activity, message, **traffic)
        event["is_src_dst_assignment_known"] = True
        if "src_endpoint" not in event and "dst_endpoint" not in event:
            event["dst_endpoint"] = self._envelope.nowhere
        return self._emit(event, traffic.get("unmapped"))

    def http(
        self,
        method: str,
        message: str,
        *,
        scheme: str = "http",
        host: str,
        port: int,
        path: str,
        activity: str = "Other",
        code: int | None = None,
        **traffic: Unpack[Traffic],
    ) -> Event:
        """A decided request: `HTTP:<METHOD>`. `path` without query (a query is cut off, there and in the texts);
        `code` is the status that was answered. The destination defaults to `host` and `port`."""
        if traffic.get("dst") is None:
            traffic["dst"] = Endpoint(host=host, port=port)
        event = self._traffic(ocsf.HTTP, activity, message, **traffic)
        url: dict[str, Any] = {"scheme": ocsf.clean(scheme), "hostname": ocsf.clean(host.rpartition("@")[2])}
        if 0 <= port <= 65535:
            url["port"] = port
        url["path"] = ocsf.clean(path.partition("?")[0].partition("#")[0])
        event["http_request"] = {"url": url}
        unmapped = dict(traffic.get("unmapped") or {})
        known = ocsf.http_method(method)
        if known in ocsf.HTTP_METHODS:
            event["http_request"]["http_method"] = known
        elif known:
            unmapped["http_method"] = known  # PROPFIND and the like: the schema lists nine methods and no others
        if code is not None:
            event["http_response"] = {"code": code}
        event.setdefault("observation_point_id", _AT_DESTINATION)
        return self._emit(event, unmapped)

    def process(
        self,
        activity: str,
        message: str,
        *,
        process: Process,
        exit_code: int | None = None,
        severity: Severity = Severity.INFORMATIONAL,
        ok: bool | None = True,
        action: str | None = None,
        disposition: str | None = None,
    ) -> Event:
        """Something happened to a process: `PROC:<ACTIVITY>`. `activity` is Launch, Terminate, Open, Inject or Set
        User ID; the acting process is this supervisor."""
        event = self._envelope.event(ocsf.PROCESS, activity, severity, message)
        ocsf.set_status(event, ok)
        _set_control(event, action, disposition)
        event["actor"] = self._envelope.supervisor
        event["process"] = ocsf.process(process)
        if activity == "Launch":
            event["launch_type_id"], event["launch_type"] = 1, "Spawn"
        if exit_code is not None:
            event["exit_code"] = exit_code
        return self._emit(event)

    def finding(
        self,
        uid: str,
        title: str,
        message: str,
        *,
        severity: Severity = Severity.MEDIUM,
        alert: bool = False,
        confidence: str | None = None,
        action: str | None = None,
        disposition: str | None = None,
        evidence: Mapping[str, str] | None = None,
        remediation: str | None = None,
        desc: str | None = None,
    ) -> Event:
        """Something a person should look at: `FINDING:<DISPOSITION>`. `uid` is stable per kind of finding;
        `confidence` is Low, Medium or High; `evidence` values are strings."""
        event = self._envelope.event(ocsf.FINDING, "Create", severity, message)
        _set_control(event, action, disposition)
        event["finding_info"] = {"uid": ocsf.clean(uid), "title": ocsf.clean(title)}
        if desc is not None:
            event["finding_info"]["desc"] = ocsf.clean(desc)
        if evidence:
            event["evidences"] = [
                {"data": {ocsf.clean(key): ocsf.clean(str(value)) for key, value in evidence.items()}}
            ]
        if remediation is not None:
            event["remediation"] = {"desc": ocsf.clean(remediation)}
        if alert:
            event["is_alert"] = True
        if confidence is not None:
            ocsf.labelled(event, "confidence", confidence.capitalize(), ocsf.CONFIDENCE_IDS)
        return self._emit(event)

    def lifecycle(
        self,
        activity: str,
        message: str,
        *,
        severity: Severity = Severity.INFORMATIONAL,
        ok: bool | None = True,
    ) -> Event:
        """The supervisor itself started, stopped, …: `LIFECYCLE:<ACTIVITY>`. The line never shows the message."""
        event = self._envelope.event(ocsf.LIFECYCLE, activity, severity, message)
        ocsf.set_status(event, ok)
        event["app"] = self._envelope.product
        return self._emit(event)

    # What several rooms say in one agreed shape.

    def proxy_listening(self, ip: str, port: int) -> Event:
        """The proxy accepts connections on this address."""
        address = f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"
        return self.network("Listen", f"Proxy listening on {address}", ok=True, dst=Endpoint(ip=ip, port=port))

    def process_launched(self, process: Process) -> Event:
        """The workload runs. Its command line is not recorded: arguments may hold secrets."""
        return self.process(
            "Launch",
            f"Process started: pid={process.pid}",
            process=_without_arguments(process),
            action="Allowed",
        )

    def process_terminated(self, process: Process, exit_code: int | None, *, timed_out: bool = False) -> Event:
        """The workload ended with `exit_code` (128+n for a signal), or with `timed_out` is about to be killed (exit
        code None: it has none yet)."""
        process = _without_arguments(process)
        if timed_out:
            return self.process(
                "Terminate",
                "Process timed out, killing",
                process=process,
                exit_code=exit_code,
                severity=Severity.CRITICAL,
                ok=False,
                action="Denied",
            )
        message = "Process exited" if exit_code is None else f"Process exited with code {exit_code}"
        return self.process("Terminate", message, process=process, exit_code=exit_code, action="Allowed")

    def bypass(
        self,
        ip: str,
        port: int,
        protocol: str,
        *,
        host: str | None = None,
        actor: Process | None = None,
        uid: int | None = None,
    ) -> tuple[Event, Event]:
        """The workload tried to go around the proxy and was rejected by the fence: the refusal and its finding.

        `protocol` is the transport in lower case; `actor` is the process, or None where the kernel does not show it, and
        `uid` the user of the socket, which the kernel knows even when the process is gone.
        """
        actor = actor or Process("-", 0)
        head = f"BYPASS_DETECT {ip}:{port} proto={protocol} binary={actor.name}"
        hint = wording.bypass_hint(protocol, port)
        refusal = self.network(
            "Refuse",
            f"{head} action=reject reason={wording.BYPASS_REASON}",
            action="Denied",
            dst=Endpoint(host=host, ip=ip, port=port),
            actor=actor,
            policy="bypass-detect",
            engine="nftables",
            observation_point=_ON_THE_WAY,
        )
        finding = self.finding(
            "bypass-detect",
            "Proxy Bypass Detected",
            f"{head} hint={hint}",
            alert=True,
            confidence="High",
            action="Denied",
            evidence=wording.bypass_evidence(ip, port, protocol, actor)
            | ({"uid": str(uid)} if uid is not None else {}),
            remediation=hint,
            desc=wording.BYPASS_REASON,
        )
        return refusal, finding

    def degraded(
        self,
        requested: str,
        *,
        effective: str = "host",
        egress: str = "observe",
        error: str | None = None,
        errno: str | None = None,
        probe: str | None = None,
        asked: bool | None = None,
        subsystem: str | None = None,
    ) -> tuple[Event, Event]:
        """Egress policy is only observed: `CONFIG:DEGRADED` and its finding, once per start.

        `asked` True means as the operator wished (Success, no alert), False a fallback; left out, it follows from
        `requested` being "host". Of a fallback, `error` says what the host refused ("setns: Operation not permitted"),
        `errno` is its symbol ("EPERM"), `probe` the step that failed, `subsystem` its name where the failure
        was tolerated. `effective` other than "host" is a sandbox with a namespace of its own whose egress is observed on
        request; `egress` "enforce" one whose proxy enforces while nothing keeps clients on the way to it.
        """
        if asked is None:
            asked = requested == "host"
        message = wording.degraded_message(requested, effective, egress, subsystem, error)
        event = self._config("degraded", message, None, Severity.MEDIUM, asked)
        _set_at_risk(event)
        if errno is not None:
            event["status_code"] = ocsf.clean(errno)
        if error is not None:
            event["status_detail"] = ocsf.clean(f"{probe} failed: {error}" if probe else error)
        modes = {"network_mode_requested": requested, "network_mode_effective": effective}
        why = {} if asked else wording.fallback_facts(probe, errno)
        tolerated = {"subsystem": subsystem} if subsystem else {}
        self._emit(event, {**modes, "egress_enforcement": egress, **why, **tolerated})
        text, desc, remedy = wording.degraded_finding(effective, egress, asked)
        finding = self.finding(
            "egress-enforcement-unavailable",
            "Egress Enforcement Unavailable",
            text,
            severity=Severity.MEDIUM if asked else Severity.HIGH,
            alert=not asked,
            confidence="High",
            action="Observed",
            evidence=modes | ({"errno": errno} if errno else {}),
            remediation=remedy,
            desc=desc,
        )
        return event, finding

    def _config(self, state: str, message: str, enabled: bool | None, severity: Severity, ok: bool | None) -> Event:
        event = self._envelope.event(ocsf.CONFIG, "Log", severity, message)
        ocsf.set_status(event, ok)
        event["state_id"] = ocsf.OTHER if enabled is None else 2 if enabled else 1
        event["state"] = ocsf.clean(state)
        return event

    def _traffic(
        self,
        kind: ocsf.EventClass,
        activity: str,
        message: str,
        *,
        severity: Severity | None = None,
        ok: bool | None = None,
        action: str | None = None,
        disposition: str | None = None,
        src: Endpoint | None = None,
        dst: Endpoint | None = None,
        actor: Process | None = None,
        policy: str | None = None,
        engine: str | None = None,
        reason: str | None = None,
        protocol: str | None = None,
        observation_point: int | None = None,
        unmapped: Mapping[str, object] | None = None,
    ) -> Event:
        would_deny = action == "Observed" and reason is not None
        if severity is None:
            severity = Severity.MEDIUM if would_deny or action == "Denied" else Severity.INFORMATIONAL
        event = self._envelope.event(kind, activity, severity, wording.without_query(message))
        event["proxy_endpoint"] = self._envelope.proxy_endpoint
        ocsf.set_status(event, ok)
        _set_control(event, action, disposition)
        if would_deny:
            event["status_code"] = WOULD_DENY
        if reason is not None:
            event["status_detail"] = ocsf.clean(wording.without_query(reason))
        _set_parties(event, src, dst, actor)
        if policy is not None or engine is not None:
            event["firewall_rule"] = {"name": ocsf.clean(policy or "-"), "type": ocsf.clean(engine or "-")}
        if protocol is not None:
            event["connection_info"] = ocsf.connection_info(protocol, dst)
        if observation_point is not None:
            event["observation_point_id"] = observation_point
        return event

    def _emit(self, event: Event, unmapped: Mapping[str, object] | None = None) -> Event:
        if unmapped:
            event["unmapped"] = ocsf.plain(unmapped)
        line = shorthand(event)
        for sink in self._sinks:
            sink.write(event, line)
        return event


def _set_control(event: Event, action: str | None, disposition: str | None) -> None:
    if action is not None:
        ocsf.labelled(event, "action", action, ocsf.ACTION_IDS)
        disposition = disposition or _EXPECTED_DISPOSITION.get(action)
    if disposition is not None:
        ocsf.labelled(event, "disposition", disposition, ocsf.DISPOSITION_IDS)


def _set_parties(event: Event, src: Endpoint | None, dst: Endpoint | None, actor: Process | None) -> None:
    for name, end in (("src_endpoint", src), ("dst_endpoint", dst)):
        if end is not None and (made := ocsf.endpoint(end)):
            event[name] = made
    if actor is not None:
        event["actor"] = {"process": ocsf.process(actor)}


def _set_at_risk(event: Event) -> None:
    ocsf.labelled(event, "security_level", "At Risk", ocsf.SECURITY_LEVEL_IDS)
    ocsf.labelled(event, "prev_security_level", "Unknown", ocsf.SECURITY_LEVEL_IDS)
    event["security_states"] = [{"state_id": 4, "state": "Protection off"}]


def _without_arguments(process: Process) -> Process:
    return Process(process.name, process.pid, ancestors=process.ancestors)
