"""The workload's environment block: what is inherited, what is withheld, and what proxy and trust replace."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openshell_supervisor.workload import environ

URL = "http://10.200.0.1:3128"
SESSION = environ.Session("sandbox", "/sandbox", tty=False)
TRUST = environ.Trust(pathlib.Path("/run/x/openshell-ca.pem"), pathlib.Path("/run/x/ca-bundle.pem"))
PASSWORD = "hunter2"
CORPORATE = f"http://alice:{PASSWORD}@proxy.corp.test:8080"


def block(
    inherited: Mapping[str, str] = {"PATH": "/bin"},
    *,
    session: environ.Session = SESSION,
    user: Mapping[str, str] = {},
    url: str | None = URL,
    trust: environ.Trust | None = TRUST,
) -> dict[str, str]:
    """The block for these inputs."""
    return environ.workload_environment(inherited, session=session, user_variables=user, proxy_url=url, trust=trust)


def test_the_contract_holds() -> None:
    """Contract 1.7 and 1.9: each variable that upstream sets has upstream's value, and `all_proxy` is not among them."""
    made = block()
    for name in ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "grpc_proxy"):
        assert made[name] == URL
    assert made["NO_PROXY"] == made["no_proxy"] == "127.0.0.1,localhost,::1"
    assert made["NODE_USE_ENV_PROXY"] == "1"
    for name in ("NODE_EXTRA_CA_CERTS", "DENO_CERT"):
        assert made[name] == str(TRUST.certificate)
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO"):
        assert made[name] == str(TRUST.bundle)
    session = {name: made[name] for name in ("HOME", "USER", "SHELL", "TERM", "OPENSHELL_SANDBOX")}
    assert session == {
        "HOME": "/sandbox",
        "USER": "sandbox",
        "SHELL": "/bin/bash",
        "TERM": "dumb",
        "OPENSHELL_SANDBOX": "1",
    }
    assert "all_proxy" not in made


def test_credentials_of_the_supervisor_are_withheld() -> None:
    """No name of contract 1.7 step 2 reaches the workload, nor the drivers' documents; what is not a secret stays."""
    secret = dict.fromkeys(environ.WITHHELD, PASSWORD)
    assert {"OPENSHELL_SANDBOX_TOKEN", "OPENSHELL_TLS_KEY", "OPENSHELL_K8S_SA_TOKEN_FILE"} <= environ.WITHHELD
    made = block({**secret, "OPENSHELL_ENDPOINT": "https://gateway.test", "OPENSHELL_SANDBOX_ID": "7"}, user=secret)
    assert PASSWORD not in made.values()
    assert made["OPENSHELL_ENDPOINT"] == "https://gateway.test"
    assert made["OPENSHELL_SANDBOX_ID"] == "7"


@pytest.mark.parametrize(
    "name",
    [
        "http_proxy", "HTTPS_PROXY", "Https_Proxy", "all_proxy", "All_Proxy", "ftp_proxy", "FTP_PROXY", "ws_proxy",
        "npm_config_proxy", "npm_config_https_proxy", "NPM_CONFIG_HTTPS_PROXY", "PIP_PROXY", "CARGO_HTTP_PROXY",
        "YARN_HTTPS_PROXY", "GLOBAL_AGENT_HTTP_PROXY",
    ],
)  # fmt: skip
def test_the_supervisors_own_proxy_does_not_leak(name: str) -> None:
    """A proxy with its password, in whatever variable the supervisor has it, is nowhere in the workload's block."""
    made = block({name: CORPORATE, "PATH": "/bin"}, user={name: CORPORATE})
    assert not [value for value in made.values() if PASSWORD in value]


@pytest.mark.parametrize("name", ["no_proxy", "NO_PROXY", "No_Proxy", "no_grpc_proxy", "npm_config_noproxy"])
def test_exceptions_from_the_proxy_are_ours(name: str) -> None:
    """`no_proxy=*`, inherited or the user's, does not lead clients past the proxy (to where there is no route)."""
    assert "*" not in block({name: "*"}, user={name: "*"}).values()


def test_user_variables_keep_their_value_against_the_session_only() -> None:
    """HOME, USER, LOGNAME, SHELL and TERM of the user win; proxy and trust of the user lose (contract 1.7, steps 4 to 6)."""
    session = {name: f"user's {name}" for name in ("HOME", "USER", "LOGNAME", "SHELL", "TERM")}
    egress = dict.fromkeys(
        (*environ.proxy_variables(URL), *environ.trust_variables(TRUST), "npm_config_cafile"), "mine"
    )
    made = block({**session, **egress, "EDITOR": "vi"}, user={**session, **egress, "EDITOR": "vi"})
    assert {name: made[name] for name in session} == session
    assert "mine" not in made.values()
    assert made["EDITOR"] == "vi"


def test_session_replaces_what_is_only_inherited() -> None:
    """root's HOME, USER, LOGNAME and SHELL do not reach a workload that is somebody else."""
    made = block({"HOME": "/home/before", "USER": "root", "LOGNAME": "root", "SHELL": "/bin/zsh"})
    assert (made["HOME"], made["USER"], made["LOGNAME"], made["SHELL"]) == (
        "/sandbox",
        "sandbox",
        "sandbox",
        "/bin/bash",
    )


@pytest.mark.parametrize(
    ("tty", "inherited", "wanted"),
    [(True, {}, "xterm-256color"), (True, {"TERM": "tmux"}, "tmux"), (False, {"TERM": "tmux"}, "dumb")],
)
def test_terminal_type(tty: bool, inherited: dict[str, str], wanted: str) -> None:
    """With a terminal, the type that it has; without one, dumb, whatever is inherited."""
    assert block(inherited, session=environ.Session("sandbox", "/sandbox", tty))["TERM"] == wanted


def test_without_proxy_or_trust_their_variables_are_untouched() -> None:
    """Where there is no proxy of ours and no certificate, the workload keeps what the container gave it."""
    given_ = {"HTTPS_PROXY": "http://other.test:1", "SSL_CERT_FILE": "/etc/own.pem"}
    made = block(given_, url=None, trust=None)
    assert {name: made[name] for name in given_} == given_
    assert "NODE_EXTRA_CA_CERTS" not in made


def test_replacing_and_adding_variables_do_not_overlap() -> None:
    """A variable either replaces roots (bundle) or adds to them (certificate alone): one of both would break one client."""
    replacing, adding = set(environ.BUNDLE_VARIABLES), set(environ.ADDITION_VARIABLES)
    assert not replacing & adding
    assert len(environ.trust_variables(TRUST)) == len(replacing) + len(adding) + len(environ.TRUST_SWITCHES)


NAMES = st.sampled_from(
    [
        *environ.WITHHELD,
        *environ.PROXY_URL_VARIABLES,
        *environ.OUTRANKING_PROXY_VARIABLES,
        *environ.BUNDLE_VARIABLES,
        "X",
    ]
).flatmap(lambda name: st.sampled_from([name, name.upper(), name.lower(), name.title()]))


@given(st.dictionaries(NAMES, st.just(CORPORATE)))
def test_only_one_address_is_ever_the_proxy(inherited: dict[str, str]) -> None:
    """Whatever spelling is inherited, the block's proxy variables say one thing, and only unrelated variables keep theirs."""
    made = block({name: value for name, value in inherited.items() if not name.upper().startswith("OPENSHELL_")})
    proxies = {value for name, value in made.items() if name.lower().endswith("_proxy") and name.lower() != "no_proxy"}
    assert proxies == {URL, "1"}  # "1" is the switch NODE_USE_ENV_PROXY
    assert {name.upper() for name, value in made.items() if value == CORPORATE} <= {"X"}


def test_python_in_the_block_finds_our_proxy_alone() -> None:
    """The judge is a real client's own reading of the block: urllib in a process that has it and nothing else."""
    given_ = {"All_Proxy": CORPORATE, "Https_proxy": CORPORATE, "ftp_proxy": CORPORATE, "no_proxy": "*"}
    code = "import json, urllib.request as r; print(json.dumps([r.getproxies(), r.proxy_bypass('files.test')]))"
    done = subprocess.run([sys.executable, "-c", code], env=block(given_), capture_output=True, timeout=20, check=True)
    proxies, bypass = json.loads(done.stdout)
    assert not bypass
    assert {proxies[scheme] for scheme in ("all", "http", "https")} == {URL}
    assert not [value for value in proxies.values() if PASSWORD in value]
