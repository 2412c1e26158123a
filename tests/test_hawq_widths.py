"""Tables restricted to the widths that a user allows."""

import pytest

import hawq
from hawq import allowed_widths
from hawq.widths import parse_widths


def table() -> dict[str, dict[int, float]]:
    names = ("features.0.conv", "features.0.skip", "features.1.conv", "head", "activation:head")
    return {name: {bits: 1.0 / bits for bits in (2, 4, 8)} for name in names}


def test_the_last_glob_that_matches_decides():
    restricted = allowed_widths(table(), {"*": (4, 8), "features.0.*": (8,), "features.0.skip": (2, 4)})
    assert {name: tuple(row) for name, row in restricted.items()} == {
        "features.0.conv": (8,),
        "features.0.skip": (2, 4),
        "features.1.conv": (4, 8),
        "head": (4, 8),
        "activation:head": (2, 4, 8),
    }
    assert restricted["head"] == {4: 0.25, 8: 0.125}
    assert tuple(allowed_widths(table(), {"activation:*": (8,)})["activation:head"]) == (8,)


def test_a_sensitivity_table_stays_one():
    stderr = {name: dict.fromkeys(row, 0.1) for name, row in table().items()}
    restricted = allowed_widths(hawq.SensitivityTable(table(), stderr, "hessian-trace"), {"head": (8,)})
    assert isinstance(restricted, hawq.SensitivityTable)
    assert restricted.stderr["head"] == {8: 0.1}
    assert restricted.method == "hessian-trace"


def test_names_with_brackets_match_themselves():
    assert allowed_widths({"blocks[0]": {4: 1.0, 8: 0.0}}, {"blocks[0]": (8,)}) == {"blocks[0]": {8: 0.0}}


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"tail*": (4,)}, r"'tail\*' matches none of the 5 rows, such as features.0.conv"),
        ({"head": (5,)}, "'head' has no sensitivity at 5 bits, only at 2, 4, 8"),
        ({"head": ()}, "'head' is allowed no width"),
    ],
)
def test_what_cannot_be_allowed(widths, message):
    with pytest.raises(ValueError, match=message):
        allowed_widths(table(), widths)


def test_the_command_line_form():
    assert parse_widths(["features.0.*=8", "head=8,4", "a=b=2"]) == {"features.0.*": (8,), "head": (4, 8), "a=b": (2,)}


@pytest.mark.parametrize("entry", ["head", "head=", "=4", "head=4,", "head=four", "head=4.5", "head=-4"])
def test_other_forms_are_refused(entry):
    with pytest.raises(ValueError, match="not of the form GLOB=BITS"):
        parse_widths([entry])


def test_a_glob_given_twice_is_refused():
    with pytest.raises(ValueError, match="'head' is given twice"):
        parse_widths(["head=4", "head=8"])
