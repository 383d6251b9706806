"""Every routing on every family of models: see family_checks.py."""

import pytest
from family_checks import CHECKS, cells


@pytest.mark.parametrize("name, check", cells())
def test_the_method_holds_on_every_family(name, check):
    function, allowed = CHECKS[check]
    assert function(name) <= allowed
