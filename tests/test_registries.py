"""Parts are found by their id, and only parts are."""

import pytest

from haversack.errors import PlanError
from haversack.parts.base import all_parts, part_class, part_from_dict


def test_every_part_is_found_by_its_id():
    assert all_parts()
    assert all(part_class(name) is part for name, part in all_parts().items())


@pytest.mark.parametrize(
    "name", ["", ".", "kv.", "../base", "no such", "base", "nearest.nearest", "weights.integer", None, 3]
)
def test_what_is_no_part_is_refused(name):
    with pytest.raises(PlanError, match="does not have"):
        part_from_dict({"part": name})
