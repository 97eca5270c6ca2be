"""The table of a developer's tools: what somebody types in a workspace, and what must come of it, under the confinement.

Read it as a script. Each row runs in `bash`, inside the sandbox, in an empty directory of its own that is also $HOME; $PY is a
Python that the policy lets run, $PROGRAMS the directory with the programs of these tests. A row's `shows` are regular
expressions, each of which must be found in its output (stdout and stderr together).

Rows of `refused` are tools that cannot work, because what they do is what the confinement takes away. Their scripts show the
refusal as the user reads it, with an errno, and beside it what the same tool still does.
"""

from __future__ import annotations

from dataclasses import dataclass

# The worlds that a row runs in (see workshop.py): root's default policy and the plain user's are where people are.
DEFAULT, POLICY, USER, HOST = "default", "policy", "user", "host"
EVERYWHERE = (DEFAULT, POLICY, USER, HOST)
TWO = (DEFAULT, USER)


@dataclass(frozen=True)
class Tool:
    """One row: the programs it needs, what is typed, what is read, and the worlds it runs in. Its exit status must be 0."""

    name: str
    needs: tuple[str, ...]
    types: str
    shows: tuple[str, ...]
    worlds: tuple[str, ...] = EVERYWHERE


_C = "printf '#include <stdio.h>\\nint main(void) { puts(\"c ran\"); return 0; }\\n' > a.c\n"

WORKS = (
    Tool(
        "bash",
        ("bash",),
        """
set -m
diff <(echo one) <(echo one) && echo substitution same
cat <<-END
here document
END
wc -c <<< "$(head -c 200000 /dev/zero | tr '\\0' x)"   # more than a pipe holds: bash makes a file
sleep 30 & jobs; kill %1; wait %1; echo "job ended by $(($? - 128))"
coproc cat; echo coprocess >&"${COPROC[1]}"; read -r answer <&"${COPROC[0]}"; echo "$answer answered"; kill $COPROC_PID
trap 'echo trapped' USR1; kill -USR1 $$
echo > /dev/null; head -c 3 /dev/zero /dev/urandom | wc -c; mkfifo pipe && ln -s a b && chmod 600 pipe && echo files made
""",
        (
            "substitution same",
            "here document",
            "200001",
            r"Running +sleep 30",
            "job ended by 15",
            "coprocess answered",
            "trapped",
            "files made",
        ),
    ),
    Tool(
        "processes",
        ("ps", "top", "timeout", "taskset"),
        """
sleep 30 & until [ "$(cat /proc/$!/comm)" = sleep ]; do :; done  # until then it is a bash
ps -o pid,comm -p $!; kill $!; wait $!; echo "ended by $(($? - 128))"
top -b -n1 | head -1; uptime; free | grep Mem; pgrep -c sleep; lscpu | head -1
nice -n 5 true && taskset -c 0 true && setsid -w true && echo placed; timeout 0.1 sleep 9; echo "timed out: $?"
kill -0 $PPID && echo parent there
""",
        (
            r"\d+ sleep",
            "ended by 15",
            r"top - .*load average",
            "Architecture: ",
            "placed",
            "timed out: 124",
            "parent there",
        ),
    ),
    Tool("pseudo-terminal", ("script",), "script -qec 'tty; echo seen' /dev/null", (r"/dev/pts/\d+", "seen")),
    Tool(
        "job control on a terminal",
        ("script",),
        "printf 'sleep 30 &\\njobs\\nkill %%1\\nfg\\nexit 0\\n' | script -qec 'bash --norc -i' /dev/null",
        (r"Running +sleep 30", "Terminated"),
        TWO,
    ),
    Tool(
        "tmux",
        ("tmux",),
        """
tmux -S socket new-session -d 'echo in a window > seen'
for i in $(seq 100); do [ -s seen ] && break; sleep 0.05; done; cat seen""",
        ("in a window",),
        TWO,
    ),
    Tool(
        "git",
        ("git",),
        """
git config --global user.name A && git config --global user.email a@tools.test
git init -q origin && cd origin && echo one > file && git add file && git commit -qm first
for i in 2 3 4; do echo $i > file; git commit -qam $i; done
git gc -q && git fsck && git count-objects -v
cd .. && git clone -q "file://$PWD/origin" copy && git clone -q --shared origin second && cd copy
git checkout -qb topic && echo five >> file && git commit -qam five && git rebase -q HEAD~1 && git push -q origin topic
git log --oneline | wc -l; git -C ../origin branch --list topic; git diff HEAD~1 --stat; git -C ../origin worktree add -q ../tree
git archive HEAD | tar t; git status --short --branch
""",
        ("packs: 1", r"(?m)^5$", "topic", r"file \| 1 \+", "## topic"),
    ),
    Tool(
        "python: asyncio's subprocesses",
        ("PY",),
        "$PY $PROGRAMS/asyncio_children.py",
        ("exec: said", r"exit codes: \[0, 1, 2, 3\]", "killed: -9", "streams: hello"),
    ),
    Tool(
        "python: multiprocessing",
        ("PY",),
        "$PY $PROGRAMS/many_processes.py",
        (
            "lock: 200",
            r"fork: \[0, 1, 4\]",
            r"spawn: \[0, 1, 4\]",
            r"forkserver: \[0, 1, 4\]",
            "shared memory: 7",
            r"manager: \[1\]",
            r"futures: \[0, 1, 4\]",
        ),
    ),
    Tool(
        "python: what libraries ask of the system",
        ("PY",),
        "$PY $PROGRAMS/system_calls.py",
        (
            r"callback: \[1, 2, 3\]",
            "sendfile: 100",
            r"sqlite: \[\(1,\)\]",
            "pty: said",
            "inotify: True",
            "group: -15",
            "temporary: True",
            "abstract: x",
            "trust: True",
        ),
    ),
    Tool(
        "python: venv and pip",
        ("PY",),
        """
$PY $PROGRAMS/make_wheel.py && $PY -m venv env && env/bin/pip install -q --no-index greeting-1-py3-none-any.whl
env/bin/python -c 'import greeting; print(greeting.TEXT)'; env/bin/pip list; env/bin/pip uninstall -qy greeting && echo removed
""",
        ("installed and imported", r"greeting +1", "removed"),
        (POLICY,),
    ),
    Tool(
        "node",
        ("node",),
        "node $PROGRAMS/node_system.js",
        ("exec: said", "fork: child", "worker: thread", "watch: change", "listen: true", "udp: true", "wasm: true"),
    ),
    Tool(
        "npm and npx",
        ("npm", "node"),
        """
export npm_config_offline=true npm_config_update_notifier=false npm_config_audit=false npm_config_fund=false
mkdir package project
printf '{"name": "greeter", "version": "1.0.0", "bin": {"greeter": "main.js"}}' > package/package.json
printf '#!/usr/bin/env node\\nconsole.log("the package ran")\\n' > package/main.js
(cd package && npm pack --silent) && cd project && npm init -y > ../init.log && npm install ../package/greeter-1.0.0.tgz
npm pkg set scripts.greet=greeter && npm run greet && npx --no greeter
""",
        ("greeter-1.0.0.tgz", "added 1 package", "> greeter", r"(?s)the package ran.*the package ran"),
        TWO,
    ),
    Tool(
        "gcc and make",
        ("gcc", "make"),
        _C
        + """
printf 'all: one two\\none two: a.c\\n\\tgcc -O1 -g -pipe -o $@ a.c\\n' > Makefile
make -j2; ./one; gcc -flto -o lto a.c; ./lto""",
        (r"gcc -O1 .*-o one", r"gcc -O1 .*-o two", r"(?s)c ran.*c ran"),
    ),
    Tool(
        "g++ with threads",
        ("g++",),
        """
cat > a.cc <<'END'
#include <future>
#include <iostream>
#include <thread>
int main() {
    int seen = 0;
    std::thread other([&] { seen = 1; });
    other.join();
    std::cout << "threads: " << seen + std::async(std::launch::async, [] { return 41; }).get() << std::endl;
}
END
g++ -pthread -o a a.cc && ./a""",
        ("threads: 42",),
        TWO,
    ),
    Tool(
        "cmake and ninja",
        ("cmake", "ninja", "gcc"),
        _C
        + """
cat > CMakeLists.txt <<'END'
cmake_minimum_required(VERSION 3.13)
project(p C)
add_executable(p a.c)
enable_testing()
add_test(t p)
END
cmake -G Ninja -B build . > log && ninja -C build && build/p && cd build && ctest""",
        ("Linking C executable p", "c ran", "100% tests passed"),
        TWO,
    ),
    Tool(
        "sanitizers",
        ("gcc",),
        _C + "export ASAN_OPTIONS=detect_leaks=0; gcc -fsanitize=address,undefined -o a a.c && ./a",
        ("c ran",),
        TWO,
    ),
    Tool(
        "perl",
        ("perl",),
        """
perl -MFile::Temp=tempfile -e 'my ($file, $name) = tempfile(); print `echo piped`;
    my $child = fork // die; exit 3 if !$child; waitpid $child, 0; print "child: ", $? >> 8, "\\n"'""",
        ("piped", "child: 3"),
        TWO,
    ),
    Tool(
        "files",
        ("tar", "find", "gzip", "openssl", "flock"),
        """
mkdir -p d/e && echo text > d/e/f && tar czf d.tgz d && rm -r d && tar xpf d.tgz
find . -name f -exec cat {} + | xargs -P2 -n1 echo found
flock lock true && echo locked; openssl req -x509 -newkey rsa:2048 -nodes -keyout k -out c -subj /CN=tools.test 2>/dev/null
openssl x509 -in c -noout -subject
dd if=/dev/zero of=z bs=4k count=4 conv=fsync 2>/dev/null; cp --reflink=auto z y && stat -c %s y
mktemp > t && head -c5 t; df -h . | tail -1 | wc -l; sort -S 1M --parallel=2 d/e/f""",
        ("found text", "locked", r"CN ?= ?tools.test", "16384", "/tmp/"),
        TWO,
    ),
    Tool(
        "go",
        ("go",),
        """
cat > m.go <<'END'
package main
import ("fmt"; "os/exec")
func main() { out, err := exec.Command("echo", "piped").Output(); fmt.Print(string(out), err) }
END
export GOFLAGS=-mod=mod GOTOOLCHAIN=local GOPROXY=off; go mod init tools.test/m && go build -o m . && ./m""",
        (r"piped\n<nil>",),
        (DEFAULT,),
    ),
    Tool(
        "java",
        ("java", "javac"),
        """
cat > A.java <<'END'
public class A { public static void main(String[] a) throws Exception {
    Thread t = new Thread(() -> System.out.println("thread ran")); t.start(); t.join();
    System.out.println("child: " + new ProcessBuilder("sh", "-c", "exit 3").start().waitFor());
} }
END
javac A.java && java A && java -XX:+UseZGC A""",
        (r"(?s)thread ran.*child: 3.*thread ran.*child: 3",),
        (DEFAULT,),
    ),
)

REFUSED = (
    Tool(
        "gdb",
        ("gdb", "gcc"),
        _C
        + "gcc -g -o a a.c && gdb -nx -q -batch -ex 'info line main' -ex run ./a; sleep 9 & gdb -nx -q -batch -p $!; kill $!",
        (r'Line 2 of "a.c"', r"(?s)ptrace: Operation not permitted.*ptrace: Operation not permitted"),
    ),
    Tool(
        "strace",
        ("strace",),
        "strace -V | head -1; strace -o log true; echo exit: $?",
        ("version", r"ptrace.*Operation not permitted", "exit: 1"),
        TWO,
    ),
    Tool(
        "the leak sanitizer, which traces its own process",
        ("gcc",),
        _C + "gcc -fsanitize=address -o a a.c && ./a; echo exit: $?",
        ("LeakSanitizer has encountered a fatal error", "exit: 1"),
        (USER,),
    ),
    Tool(
        "namespaces",
        ("unshare",),
        "unshare --user --map-root-user id; echo exit: $?; unshare --fork true && echo nothing unshared works",
        ("unshare.*Operation not permitted", "exit: 1", "nothing unshared works"),
    ),
    Tool(
        "podman",
        ("podman",),
        "podman --version; podman info; echo exit: $?",
        ("podman version", "Operation not permitted", "exit: 1"),
        TWO,
    ),
    Tool(
        "a program that lies outside of the file rules",
        ("bash",),
        "$OUTSIDE/program; echo exit: $?; cp /bin/true inside && ./inside && echo a copy runs",
        (r"program: Permission denied", "exit: 126", "a copy runs"),
    ),
    Tool(
        "files outside of the file rules",
        ("bash",),
        "ls /; cat $OUTSIDE/file; echo > $OUTSIDE/new; echo > /usr/new; echo > new && ls /usr/bin/env new",
        (r"'/'?: Permission denied", r"file: Permission denied", r"/new: Permission denied", r"(?m)^new$"),
    ),
)
