"""The fixture of the tests that ask a real Open Policy Agent."""

from __future__ import annotations

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # so that `import opa_process` works

import opa_process


@pytest.fixture(scope="session")
def opa_program() -> pathlib.Path:
    """The OPA that scripts/opa builds; skipped only where there is no Go."""
    missing = opa_process.missing()
    if missing:
        pytest.skip(missing)
    return opa_process.build()
