"""One line for each of the things that Python libraries ask of the system."""

import ctypes
import os
import pty
import signal
import socket
import sqlite3
import ssl
import subprocess
import tempfile

LIBC = ctypes.CDLL(None, use_errno=True)
COMPARE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_int))

numbers = (ctypes.c_int * 3)(3, 1, 2)
LIBC.qsort(numbers, 3, ctypes.sizeof(ctypes.c_int), COMPARE(lambda one, other: one[0] - other[0]))
print("callback:", list(numbers))  # a closure of libffi: memory that is made executable

with open("from", "wb+") as source, open("to", "wb") as target:
    source.write(b"x" * 100)
    source.flush()
    print("sendfile:", os.sendfile(target.fileno(), source.fileno(), 0, 100))

database = sqlite3.connect("database")
database.execute("pragma journal_mode = wal")
database.execute("create table t (a)")
database.execute("insert into t values (1)")
database.commit()
print("sqlite:", database.execute("select a from t").fetchall())

child, terminal = pty.fork()
if child == 0:
    os.execlp("echo", "echo", "said")
print("pty:", os.read(terminal, 100).decode().strip())
os.waitpid(child, 0)

print("inotify:", LIBC.inotify_add_watch(LIBC.inotify_init1(0), b".", 0xFFF) > 0)

family = subprocess.Popen("sleep 30 & sleep 30", shell=True, start_new_session=True)
os.killpg(family.pid, signal.SIGTERM)
print("group:", family.wait())

with tempfile.TemporaryDirectory() as directory, tempfile.NamedTemporaryFile(), tempfile.TemporaryFile():
    print("temporary:", os.path.isdir(directory))

server, client = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
server.bind("")  # an abstract name that the kernel picks
server.listen()
client.connect(server.getsockname())
client.send(b"x")
print("abstract:", server.accept()[0].recv(1).decode())

print("trust:", len(ssl.create_default_context().get_ca_certs()) > 0)
