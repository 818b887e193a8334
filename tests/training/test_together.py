"""What ranks decide alike."""

import pytest

from slope_megatron.storage.sums import Damaged
from slope_megatron.training import together


def refuse(kind, nested):
    def refused():
        raise kind("its file x is cut")

    inner = (lambda: together.agreed(refused)) if nested else refused
    try:
        together.agreed(inner)
    except ValueError as error:
        return isinstance(error, together.Agreed), isinstance(error, kind), str(error)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", [ValueError, Damaged, together.Agreed])
def test_an_agreed_refusal_keeps_its_kind(ranks, kind, nested):
    expected = (True, True, "its file x is cut")
    assert ranks.run(refuse, kind, nested, world=2) == [expected] * 2
