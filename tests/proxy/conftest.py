"""Fixtures of the proxy's tests."""

from __future__ import annotations

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import support


@pytest.fixture
def root(tmp_path: pathlib.Path) -> support.TestAuthority:
    """The certificate authority of the test's upstreams."""
    return support.TestAuthority(tmp_path)
