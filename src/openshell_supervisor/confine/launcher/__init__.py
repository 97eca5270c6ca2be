"""The launcher: a single-threaded process that confines itself, step by step, and then becomes the workload.

It is started with an EMPTY environment as `python -I -S -B __main__.py`, with a Unix stream socket to the supervisor as
descriptor 3. It answers one JSON line per request and knows nothing beyond them: no policy, no proxy, no secret but the
workload's own environment. Only the standard library is imported, and all of it before the first restriction, because a late
import can fail once the identity is dropped. Nothing is logged here; every failure goes back by the name of its step.

Requests, in the order of a life (`op` names them; `place`, `confinement`, `probe` and `service` carry them out):
  enter    where packets can go: "stay", "join" (setns to a passed descriptor) or "make" (a namespace of its own)
  separate a user namespace of its own, whose maps the supervisor then writes
  confine  identity, capabilities, no_new_privs, resource limits, the Landlock ruleset (a passed descriptor), the filters;
           answers what it verified and which of the last two failed
  probe    a twin tries the ways out, the proxy and what is forbidden, as the workload would; one errno (or none) each
  signal   send a signal with the identity of the workload (the supervisor may lack CAP_KILL)
  exec     become the workload; answers only when that failed, because success closes the socket

Answers: {"ok": true, …} or {"ok": false, "step": NAME, "errno": NUMBER, "error": TEXT}.
"""

# What to execute; a path, because nothing of ours is on the search path of an isolated interpreter.
ENTRY = __file__.removesuffix("__init__.py") + "__main__.py"
