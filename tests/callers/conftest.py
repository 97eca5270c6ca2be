"""So that `import connections` works from the tests of this room."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
