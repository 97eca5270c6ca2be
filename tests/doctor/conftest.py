"""So that `import asking` and `import product` work here."""

from __future__ import annotations

import pathlib
import sys

HERE = pathlib.Path(__file__).parent
for directory in (HERE, HERE.parent / "e2e"):
    sys.path.insert(0, str(directory))
