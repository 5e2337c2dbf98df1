"""The covering array covers small spaces and the plugin's; the sizes of the latter are printed."""

from itertools import combinations, product

import pytest

from . import test_attach, test_stock_models, training_case
from .covering import Rule, Space, cheap_cover, combinations_in, covering_array

BITS = {name: (0, 1) for name in "abcdef"}


def _every_case(space, rules):
    """All cases that the rules allow, one by one."""
    for values in product(*space.factors.values()):
        case = dict(zip(space.factors, values, strict=True))
        if all(rule.allows(*(case[name] for name in rule.names)) for rule in rules):
            yield case


RULES = [
    # Together: b implies a, c implies b, so c with not a is impossible though no rule names both.
    Rule(("a", "b"), lambda a, b: a or not b),
    Rule(("b", "c"), lambda b, c: b or not c),
    Rule(("d", "e", "f"), lambda d, e, f: d + e + f != 2),
]


@pytest.mark.parametrize("rules", [[], RULES], ids=["free", "ruled"])
def test_feasible_combinations_are_those_of_all_allowed_cases(rules):
    space = Space(BITS, rules)
    occurring = set().union(*(combinations_in(case, 3) for case in _every_case(space, rules)))
    assert set(space.combinations(3)) == occurring


@pytest.mark.parametrize("rules", [[], RULES], ids=["free", "ruled"])
def test_array_has_every_feasible_triple_and_only_allowed_cases(rules):
    space = Space({**BITS, "g": "xyz"}, rules)
    cases = covering_array(space)
    allowed = list(_every_case(space, rules))
    assert all(case in allowed for case in cases)
    assert set().union(*(combinations_in(case, 3) for case in cases)) == set(space.combinations(3))
    assert 3 * 2 * 2 <= len(cases) < len(allowed)


def test_array_is_deterministic():
    assert covering_array(Space(BITS, RULES)) == covering_array(Space(BITS, RULES))


def test_cheap_cover_has_all_combinations_and_prefers_cheap_cases():
    cases = covering_array(Space({**BITS, "g": "xyz"}, RULES))
    selected = cheap_cover(cases, 2, lambda case: 1 + 9 * case["a"])
    assert len(selected) < len(cases) and selected == sorted(set(selected))
    every_pair = set().union(*(combinations_in(case, 2) for case in cases))
    assert set().union(*(combinations_in(cases[n], 2) for n in selected)) == every_pair
    by_size = cheap_cover(cases, 2, lambda _: 1)
    assert sum(cases[n]["a"] for n in selected) <= sum(cases[n]["a"] for n in by_size)


@pytest.mark.parametrize(
    ("space", "array"),
    [(training_case.SPACE, test_attach.ARRAY), (test_stock_models.SPACE, test_stock_models.ARRAY)],
    ids=["rows", "stock models"],
)
def test_plugin_arrays_have_every_triple(capsys, space, array):
    triples = set(space.combinations(3))
    covered = {frozenset(some) for case in array for some in combinations(sorted(case.items()), 3)}
    assert covered == triples
    assert len(array) <= 400
    with capsys.disabled():
        print(f"\ncovering array: {len(array)} cases, {len(triples)} triples")


def test_normal_run_of_stock_models_has_every_value():
    array, quick = test_stock_models.ARRAY, test_stock_models.QUICK
    values = set().union(*(combinations_in(array[n], 1) for n in quick))
    assert values == set(test_stock_models.SPACE.combinations(1))
