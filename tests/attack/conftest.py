"""The attacks drive the product as the end-to-end tests do: `import product` works from here."""

from __future__ import annotations

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "e2e"))
