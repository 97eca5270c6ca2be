"""`python -m openshell_supervisor`: the same as the console script."""

import contextlib
import os
import sys

# `python -m` puts the working directory first on the search path. Nothing of ours may come from where a workload works.
with contextlib.suppress(FileNotFoundError):  # it is gone
    if sys.path[0] == os.getcwd() and not __file__.startswith(f"{sys.path[0]}{os.sep}"):
        del sys.path[0]

from openshell_supervisor.cli import main

if __name__ == "__main__":
    sys.exit(main())
