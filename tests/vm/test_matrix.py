"""The live tests on each of Debian's kernels, emulated: a test here is one kernel's whole turn.

RINGSIDE_VM_KERNELS=6.1,5.10 limits the kernels. The table at the end comes from conftest.py.
"""

from __future__ import annotations

import pytest

from . import kernels, run


@pytest.mark.parametrize("suite", kernels.SUITES)
def test_kernel(matrix: dict[str, run.Run], suite: str) -> None:
    """Booted, every test in it passed, the kernel had nothing to complain of."""
    if suite not in matrix:
        pytest.skip("not one of RINGSIDE_VM_KERNELS")
    if failures := matrix[suite].failures:
        pytest.fail("\n\n".join(failures), pytrace=False)
