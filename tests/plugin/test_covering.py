"""The covering array covers: small spaces, and the plugin's own, whose size is printed."""

from itertools import combinations, product

import pytest

from .covering import Rule, Space, combinations_in, covering_array, few_that_cover
from .test_attach import ARRAY, QUICK
from .training_case import SPACE

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
def test_what_is_feasible_is_what_occurs_in_some_case(rules):
    space = Space(BITS, rules)
    occurring = set().union(*(combinations_in(case, 3) for case in _every_case(space, rules)))
    assert set(space.combinations(3)) == occurring


@pytest.mark.parametrize("rules", [[], RULES], ids=["free", "ruled"])
def test_every_feasible_triple_is_in_a_case_and_every_case_is_allowed(rules):
    space = Space({**BITS, "g": "xyz"}, rules)
    cases = covering_array(space)
    allowed = list(_every_case(space, rules))
    assert all(case in allowed for case in cases)
    assert set().union(*(combinations_in(case, 3) for case in cases)) == set(space.combinations(3))
    assert 3 * 2 * 2 <= len(cases) < len(allowed)


def test_the_same_factors_give_the_same_cases():
    assert covering_array(Space(BITS, RULES)) == covering_array(Space(BITS, RULES))


def test_few_cases_cover_what_all_do():
    cases = covering_array(Space({**BITS, "g": "xyz"}, RULES))
    few = few_that_cover(cases, 2)
    assert len(few) < len(cases) and few == sorted(set(few))
    had = set().union(*(combinations_in(case, 2) for case in cases))
    assert set().union(*(combinations_in(cases[n], 2) for n in few)) == had


def test_the_plugins_cases_cover_every_triple_of_settings(capsys):
    triples = set(SPACE.combinations(3))
    covered = {frozenset(some) for case in ARRAY for some in combinations(sorted(case.items()), 3)}
    assert covered == triples
    pairs = set().union(*(combinations_in(ARRAY[n], 2) for n in QUICK))
    assert pairs == set(SPACE.combinations(2))
    assert len(ARRAY) <= 400
    with capsys.disabled():
        message = f"{len(ARRAY)} cases, {len(triples)} triples"
        print(f"\ncovering array: {message}; in `make test` {len(QUICK)} cases, {len(pairs)} pairs")
