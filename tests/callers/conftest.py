"""So that `import connections` and `import product` work from the tests of this room."""

import pathlib
import sys

sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parent.parent / "e2e")]
