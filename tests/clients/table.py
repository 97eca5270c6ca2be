"""The table of real clients: what a user types, what comes of it, and what the user reads when it is refused.

Read it as a script. Every line runs as it stands in `sh`, inside the sandbox, in a directory of its own that is also $HOME,
with no flag for proxy or trust. $URL is the upstream at the host that the policy lists; $ELSEWHERE is the same upstream at a
host that it does not list; $GRPC is HOST:PORT of the gRPC server; $PY is this Python. Three kinds of line:

- `works`:   answered, exit status 0, and the output shows what the upstream has.
- `denied`:  the host is allowed and the path or method is not: asked only where the proxy inspects (`protocol: rest`).
- `refused`: the host is not allowed: asked inspected and not (`protocol` absent), where the tunnel itself is refused.

The last column is the text by which the user or agent can tell (a regular expression over stdout and stderr).
"""

from __future__ import annotations

from dataclasses import dataclass

INSPECTED, PASSED = "inspected", "passed"
BOTH = (INSPECTED, PASSED)


@dataclass(frozen=True)
class Step:
    """One line of the script; `kind` is works, denied or refused."""

    kind: str
    line: str
    shows: str


@dataclass(frozen=True)
class Client:
    """One client: the programs it needs, what its policy allows ("METHOD path"), and the script."""

    name: str
    needs: tuple[str, ...]
    allows: tuple[str, ...]
    script: tuple[Step, ...]
    modes: tuple[str, ...] = BOTH
    encoded_slash: bool = False


def works(line: str, shows: str) -> Step:
    """Must be answered."""
    return Step("works", line, shows)


def denied(line: str, shows: str) -> Step:
    """Must be refused by path or method."""
    return Step("denied", line, shows)


def refused(line: str, shows: str) -> Step:
    """Must be refused by host."""
    return Step("refused", line, shows)


HELLO = "hello from the real upstream"
PUBLIC = ("GET /public/**",)
WHOLE_REASON = '"reason_id": "rule_not_matched"'

_ARRIVALS = (
    "import os, time; came = []\nwhile data := os.read(0, 65536): came.append((time.monotonic(), data.count(10)))\n"
    "print(sum(n for _, n in came), 'lines,', 'in pieces' if came[-1][0] - came[0][0] > 0.4 else 'all at once')"
)
_URLLIB = "import urllib.request as r, sys; print(r.urlopen(sys.argv[1]).read().decode())"
_REQUESTS = "import requests, sys; a = requests.get(sys.argv[1]); print(a.status_code, a.text); a.raise_for_status()"
_HTTPX = (
    "import httpx, sys; a = httpx.Client(http2=sys.argv[2] == '2').get(sys.argv[1]); "
    "print(a.http_version, a.status_code, a.text); a.raise_for_status()"
)
_AIOHTTP = """
import aiohttp, asyncio, sys
async def main():
    async with aiohttp.ClientSession(trust_env=True) as session, session.get(sys.argv[1]) as answer:
        print(answer.status, await answer.text())
        answer.raise_for_status()
asyncio.run(main())
"""
_FETCH = (
    "fetch(process.argv[1]).then(async a => { console.log(a.status, await a.text()); process.exitCode = a.ok ? 0 : 1 })"
    ".catch(e => { console.error(e.message, e.cause); process.exitCode = 1 })"
)
_HTTPS_GET = (
    "require('https').get(process.argv[1], a => { console.log(a.statusCode); a.pipe(process.stdout) })"
    ".on('error', e => { console.error(e.message); process.exitCode = 1 })"
)
_JAVA_TOLD = (
    'proxy=${HTTPS_PROXY#http://}; export JAVA_TOOL_OPTIONS="-Dhttps.proxyHost=${proxy%:*} -Dhttps.proxyPort=${proxy#*:}'
    ' -Djavax.net.ssl.trustStore=$PWD/trust.p12"; java programs/Get.java'
)

CLIENTS = (
    Client("curl", ("curl",), (*PUBLIC, "PUT /up/**"), (
        works("curl -sS $URL/public/hello", HELLO),
        works("curl -sS --http1.1 $URL/public/hello", HELLO),
        works("curl -sS --http2 -w 'HTTP/%{http_version}' $URL/public/hello", f"{HELLO}\nHTTP/2"),
        works("curl -sSL -w '%{num_redirects} redirects' $URL/public/redirect", f"{HELLO}\n2 redirects"),
        works("curl -sSf -T programs/Get.java $URL/up/x | cut -d' ' -f2; sha256sum programs/Get.java", r"^(\w{64})\n\1"),
        works("head -c 3000000 /dev/zero | curl -sSf -T - $URL/up/x", "^3000000 "),
        denied("curl -sS --fail-with-body $URL/private/secret", WHOLE_REASON),
        denied("curl -sSL --fail-with-body $URL/public/away", WHOLE_REASON),
        denied("curl -sS --fail-with-body -X DELETE $URL/public/hello", "DELETE /public/hello"),
        refused("curl -sS $ELSEWHERE/public/hello", "CONNECT tunnel failed, response 403"),
    )),
    Client("curl, streams and many at once", ("curl",), PUBLIC, (
        works(f'curl -sSN --http1.1 $URL/public/slow | $PY -c "{_ARRIVALS}"', "3 lines, in pieces"),
        works(f'curl -sSN --http2 $URL/public/slow | $PY -c "{_ARRIVALS}"', "3 lines, in pieces"),
        works("curl -sSZ --http2 --parallel-max 16 $URL/public/hello'?[1-60]' | grep -c hello", "\n60\n"),
        works("curl -sSZ --http1.1 --parallel-max 16 $URL/public/hello'?[1-60]' | grep -c hello", "\n60\n"),
    )),
    # Debian's wget (GnuTLS) reads no environment variable for its roots; its configuration file is the only way.
    Client("wget, told its roots", ("wget",), PUBLIC, (
        works("wget -qO- --ca-certificate=$SSL_CERT_FILE $URL/public/hello", HELLO),
        works("wget -qO- --ca-certificate=$SSL_CERT_FILE $URL/public/redirect", HELLO),
        denied("wget -nv -O- --ca-certificate=$SSL_CERT_FILE $URL/private/secret", "ERROR 403: Forbidden"),
        refused("wget -nv -O- --ca-certificate=$SSL_CERT_FILE $ELSEWHERE/public/hello", "Proxy tunneling failed: Forbidden"),
    )),
    Client("git", ("git",), ("GET /git/**", "POST /git/**/git-upload-pack"), (
        works("git clone $URL/git/real.git && cat real/README", "cloned through the sandbox"),
        works("cd real && git fetch && git pull", "Already up to date"),
        works("cd real && git ls-remote", "refs/heads/main"),
        denied("cd real && git -c user.name=x -c user.email=x@y commit -q --allow-empty -m x && git push", "403"),
        refused("git clone $ELSEWHERE/git/real.git other", "CONNECT tunnel failed, response 403"),
    )),
    Client("git push", ("git",), ("GET /git/**", "POST /git/**"), (
        works("git clone -q $URL/git/real.git && cd real && head -c 3000000 /dev/urandom > big && git add big &&"
              " git -c user.name=x -c user.email=x@y commit -qm x && git push origin HEAD:refs/heads/$MODE", "new branch"),
    )),
    Client("pip", (), ("GET /pypi/**",), (
        works("$PY -m pip download -q --no-deps -d got -i $URL/pypi/simple tiny-real && ls got",
              "tiny_real-1.0-py3-none-any.whl"),
        works("$PY -m pip install -q -t lib -i $URL/pypi/simple tiny-real &&"
              " PYTHONPATH=lib $PY -c 'import tiny_real; print(tiny_real.WORD)'", "installed through the sandbox"),
        denied("$PY -m pip download --retries 0 -i $URL/private/simple tiny-real", "No matching distribution"),
        refused("$PY -m pip download --retries 1 -i $ELSEWHERE/pypi/simple tiny-real", "Tunnel connection failed: 403"),
    )),
    Client("npm", ("npm",), ("GET /npm/**",), (
        works("npm view --registry $URL/npm/ tiny-real description", "a real package"),
        works("npm install --silent --registry $URL/npm/ tiny-real && node -p 'require(\"tiny-real\")'",
              "installed through the sandbox"),
        denied("npm view --registry $URL/private/ tiny-real", "403"),
        refused("npm view --registry $ELSEWHERE/npm/ --fetch-retries 0 tiny-real", "403|ECONNRESET"),
    )),
    # npm asks for the document of @real/tiny at /@real%2ftiny: an inspected endpoint must allow encoded slashes.
    Client("npm, scoped", ("npm",), ("GET /npm/**",), (
        works("npm view --registry $URL/npm/ @real/tiny description", "a real package"),
    ), encoded_slash=True),
    Client("npm, scoped, encoded slash not allowed", ("npm",), ("GET /npm/**",), (
        denied("npm view --registry $URL/npm/ @real/tiny description", "400 .*invalid_request_target"),
    ), modes=(INSPECTED,)),
    Client("Python urllib", (), PUBLIC, (
        works(f'$PY -c "{_URLLIB}" $URL/public/hello', HELLO),
        works(f'$PY -c "{_URLLIB}" $URL/public/redirect', HELLO),
        denied(f'$PY -c "{_URLLIB}" $URL/private/secret', "HTTP Error 403"),
        refused(f'$PY -c "{_URLLIB}" $ELSEWHERE/public/hello', "Tunnel connection failed: 403"),
    )),
    Client("Python requests", (), PUBLIC, (
        works(f'$PY -c "{_REQUESTS}" $URL/public/hello', HELLO),
        denied(f'$PY -c "{_REQUESTS}" $URL/private/secret', WHOLE_REASON),
        refused(f'$PY -c "{_REQUESTS}" $ELSEWHERE/public/hello', "Tunnel connection failed: 403"),
    )),
    Client("Python httpx", (), PUBLIC, (
        works(f'$PY -c "{_HTTPX}" $URL/public/hello 1', f"HTTP/1.1 200 {HELLO}"),
        works(f'$PY -c "{_HTTPX}" $URL/public/hello 2', f"HTTP/2 200 {HELLO}"),
        denied(f'$PY -c "{_HTTPX}" $URL/private/secret 2', WHOLE_REASON),
        refused(f'$PY -c "{_HTTPX}" $ELSEWHERE/public/hello 2', "ProxyError: 403"),
    )),
    Client("Python aiohttp", (), PUBLIC, (
        works(f"$PY -c '{_AIOHTTP}' $URL/public/hello", HELLO),
        denied(f"$PY -c '{_AIOHTTP}' $URL/private/secret", WHOLE_REASON),
        refused(f"$PY -c '{_AIOHTTP}' $ELSEWHERE/public/hello", "403"),
    )),
    Client("gRPC (Python)", (), ("POST /real.Greeter/Say*",), (
        works("$PY programs/grpc_calls.py $GRPC /real.Greeter/Say /real.Greeter/SayStream",
              "said one\n0-five 1-five 2-five 3-five 4-five"),
        denied("$PY programs/grpc_calls.py $GRPC /real.Greeter/Forget", "PERMISSION_DENIED .*POST /real.Greeter/Forget"),
        refused("$PY programs/grpc_calls.py ${ELSEWHERE#https://} /real.Greeter/Say", "UNAVAILABLE .*403"),
    )),
    Client("openssl s_client", ("openssl",), PUBLIC, (
        works(r"printf 'GET /public/hello HTTP/1.1\r\nHost: '${URL#https://}'\r\nConnection: close\r\n\r\n' |"
              " openssl s_client -quiet -verify_return_error -proxy ${HTTPS_PROXY#http://} -connect ${URL#https://}"
              " -servername files.clients.test", HELLO),
        refused("openssl s_client -proxy ${HTTPS_PROXY#http://} -connect ${ELSEWHERE#https://} </dev/null", "403"),
    )),
    Client("Go", ("go",), ("GET /go/**",), (
        works("GOSUMDB=off GOPROXY=$URL/go go mod download -json real.test/tiny@v1.0.0", '"Zip":'),
        denied("GOSUMDB=off GOMODCACHE=$PWD/a GOPROXY=$URL/private go mod download real.test/tiny@v1.0.0", "403 Forbidden"),
        refused("GOSUMDB=off GOMODCACHE=$PWD/b GOPROXY=$ELSEWHERE/go go mod download real.test/tiny@v1.0.0", "Forbidden"),
    )),
    Client("cargo", ("cargo",), ("GET /cargo/**",), (
        works("sh programs/cargo_vendor.sh $URL/cargo/ && find . -name tiny-real-1.0.0.crate", "cache/.*/tiny-real-1.0.0.crate"),
        denied("rm -rf .cargo; sh programs/cargo_vendor.sh $URL/private/", "403"),
        refused("rm -rf .cargo; sh programs/cargo_vendor.sh $ELSEWHERE/cargo/", "CONNECT tunnel failed, response 403"),
    )),
    # Node's fetch and https ask the environment for a proxy from 22.21 and 24 on (NODE_USE_ENV_PROXY); older ones go straight
    # out, find no route and say so.
    Client("Node fetch", ("node>=22.21",), PUBLIC, (
        works(f'node -e "{_FETCH}" $URL/public/hello', HELLO),
        denied(f'node -e "{_FETCH}" $URL/private/secret', WHOLE_REASON),
        refused(f'node -e "{_FETCH}" $ELSEWHERE/public/hello', "403|Proxy response"),
        works(f'node -e "{_HTTPS_GET}" $URL/public/hello', HELLO),
    )),
    Client("Node fetch, too old for proxies", ("node<22.21",), PUBLIC, (
        refused(f'node -e "{_FETCH}" $URL/public/hello', "fetch failed"),
        refused(f'node -e "{_HTTPS_GET}" $URL/public/hello', "EAI_AGAIN|ENOTFOUND"),
    )),
    # Java reads no variable but its own options, and roots only from a store of its own format.
    Client("Java HttpClient, told", ("java",), PUBLIC, (
        works("$PY programs/truststore.py trust.p12", ""),
        works(f"{_JAVA_TOLD} $URL/public/hello", f"200 {HELLO}"),
        denied(f"{_JAVA_TOLD} $URL/private/secret", WHOLE_REASON),
        refused(f"{_JAVA_TOLD} $ELSEWHERE/public/hello", "Tunnel failed, got: 403"),
    )),
    Client("Java HttpClient, not told", ("java",), PUBLIC, (
        refused("java programs/Get.java $URL/public/hello", "UnresolvedAddressException|ConnectException"),
    ), modes=(INSPECTED,)),
)  # fmt: skip
