"""The fixture of the gVisor tests: a runsc that runs here, built once and kept outside of the checkout."""

from __future__ import annotations

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # so that `import runsc` works
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import runsc


@pytest.fixture(scope="session")
def gvisor() -> runsc.Gvisor:
    """gVisor's runsc; skipped where it cannot be had, with the reason."""
    missing = runsc.missing()
    if missing:
        pytest.skip(missing)
    try:
        return runsc.Gvisor(runsc.build())
    except RuntimeError as error:
        pytest.skip(f"gVisor's runsc cannot be built: {error}")
