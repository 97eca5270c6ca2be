"""Let regopy load on a host without libatomic.so.1, which its library names as needed and uses nothing of.

Debian's minimal images lack that library and an ordinary user cannot install it. Where it is missing, the name is replaced in
the virtual environment's own copy by that of the C library, which is loaded anyway. Does nothing where libatomic is there.
"""

import ctypes
import pathlib
import sysconfig

NEEDED, INSTEAD = b"\0libatomic.so.1\0", b"\0libc.so.6\0"

try:
    ctypes.CDLL("libatomic.so.1")
except OSError:
    for library in (pathlib.Path(sysconfig.get_path("platlib")) / "regopy").rglob("*.so*"):
        content = library.read_bytes()
        if NEEDED in content:
            library.write_bytes(content.replace(NEEDED, INSTEAD.ljust(len(NEEDED), b"\0")))
