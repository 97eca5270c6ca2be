"""Copy a Python that only its owner can read to a place where every user can.

Root's pyenv usually lives under /root (mode 0700). The supervisor runs workloads as another user, and the tests run the
supervisor itself as one, so neither can use that interpreter. Usage: readable_python.py PYTHON DEST; prints the path of the
copied interpreter. The run path inside the ELF file is replaced in place, because it names the old directory.
"""

import pathlib
import shutil
import subprocess
import sys

ASK = "import sys, sysconfig as c; print(sys.base_prefix, '%d.%d' % sys.version_info[:2], c.get_config_var('LIBDIR'))"
LEFT_OUT = ("test", "idlelib", "turtledemo", "site-packages", "tkinter", "config-*", "*.a", "__pycache__")


def main(python: str, dest: str) -> None:
    """Copy the installation that `python` belongs to into `dest` and print the new interpreter's path."""
    prefix, version, libdir = subprocess.run(
        [python, "-c", ASK], check=True, capture_output=True, text=True
    ).stdout.split()
    root = pathlib.Path(dest)
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(prefix, root, symlinks=True, ignore=shutil.ignore_patterns("share", "include", *LEFT_OUT))
    binary = root / "bin" / f"python{version}"
    relative = b"$ORIGIN/../lib\0"
    old = libdir.encode() + b"\0"
    binary.write_bytes(binary.read_bytes().replace(old, relative.ljust(len(old), b"\0")))
    sys.stdout.write(f"{binary}\n")


main(*sys.argv[1:])
