"""Covering arrays: few cases that contain every feasible combination of any three factors.

A bug of a parallel layout depends on two or three settings, hardly ever on sixteen, so testing all
triples finds nearly what testing all cases would. The array is built greedily, one case at a time
(AETG: Cohen et al. 1997), from a fixed seed: the same factors give the same cases.

    n  values of all factors, numbered consecutively
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import combinations, product
from typing import Any, NamedTuple

import numpy as np

Case = dict[str, Any]
"""A value for every factor."""

Combination = frozenset[tuple[str, Any]]
"""Values of some factors."""

_SEED = 0
_CANDIDATES = 6
"""Candidates per case, of which the best is taken; more make the array hardly smaller."""


class Rule(NamedTuple):
    """The allowed combinations of the values of some factors."""

    names: tuple[str, ...]
    allows: Callable[..., bool]


class Space:
    """Factors with their values, and the rules that every case satisfies."""

    def __init__(self, factors: Mapping[str, Sequence[Any]], rules: Sequence[Rule] = ()) -> None:
        """Values of factors that no rule names go with every other value."""
        self.factors = {name: tuple(values) for name, values in factors.items()}
        self._rules = tuple(rules)
        bound = {name for rule in rules for name in rule.names}
        self._bound = tuple(name for name in factors if name in bound)
        self._completes = lru_cache(maxsize=None)(self._search)

    def feasible(self, chosen: Case) -> bool:
        """Whether some case has these values."""
        return self._completes(
            tuple((name, chosen[name]) for name in self._bound if name in chosen)
        )

    def _search(self, chosen: tuple[tuple[str, Any], ...]) -> bool:
        case = dict(chosen)
        for rule in self._rules:
            if all(name in case for name in rule.names):
                if not rule.allows(*(case[name] for name in rule.names)):
                    return False
        open_names = [name for name in self._bound if name not in case]
        if not open_names:
            return True
        return any(self.feasible({**case, open_names[0]: v}) for v in self.factors[open_names[0]])

    def combinations(self, strength: int) -> Iterator[Combination]:
        """Every feasible combination of values of `strength` factors."""
        for names in combinations(self.factors, strength):
            for values in product(*(self.factors[name] for name in names)):
                if self.feasible(dict(zip(names, values, strict=True))):
                    yield frozenset(zip(names, values, strict=True))


def combinations_in(case: Case, strength: int) -> set[Combination]:
    """The combinations of `strength` factors that a case has."""
    return {frozenset(some) for some in combinations(case.items(), strength)}


def covering_array(space: Space) -> list[Case]:
    """Cases that together have every feasible combination of three factors."""
    rng = random.Random(_SEED)
    values = [(name, value) for name in space.factors for value in space.factors[name]]
    index = {value: n for n, value in enumerate(values)}
    missing_nnn = np.zeros((len(values),) * 3, dtype=bool)
    for triple in space.combinations(3):
        for a, b, c in permutations_of(index[value] for value in triple):
            missing_nnn[a, b, c] = True
    cases = []
    while missing_nnn.any():
        triples = np.argwhere(missing_nnn)
        candidates = [
            _candidate(space, values, missing_nnn, triples, rng) for _ in range(_CANDIDATES)
        ]
        best = max(candidates, key=lambda chosen: missing_nnn[np.ix_(chosen, chosen, chosen)].sum())
        missing_nnn[np.ix_(best, best, best)] = False
        cases.append({name: dict(values[n] for n in best)[name] for name in space.factors})
    return cases


def permutations_of(indices: Iterable[int]) -> Iterator[tuple[int, int, int]]:
    """All orders of three indices."""
    a, b, c = indices
    yield from ((a, b, c), (a, c, b), (b, a, c), (b, c, a), (c, a, b), (c, b, a))


def _candidate(
    space: Space, values: list[tuple[str, Any]], missing_nnn: Any, triples: Any, rng: random.Random
) -> list[int]:
    """A case around a missing triple; each other factor takes the value that adds most triples."""
    chosen = [int(n) for n in triples[rng.randrange(len(triples))]]
    case = dict(values[n] for n in chosen)
    rest = [name for name in space.factors if name not in case]
    rng.shuffle(rest)
    for name in rest:
        gains_n = missing_nnn[:, chosen][:, :, chosen].sum((1, 2))
        fitting = [
            n
            for n, (owner, value) in enumerate(values)
            if owner == name and space.feasible({**case, name: value})
        ]
        best = max(fitting, key=lambda n: (gains_n[n], rng.random()))
        chosen.append(best)
        case[name] = values[best][1]
    return chosen


def cheap_cover(cases: Sequence[Case], strength: int, cost: Callable[[Case], float]) -> list[int]:
    """Ascending indices of cheap cases that have all combinations of `strength` factors.

    Greedy: the case with the most new combinations per cost comes next. Cases that later ones made
    redundant are dropped, the most expensive first.
    """
    combinations_of = [combinations_in(case, strength) for case in cases]
    cost_of = [cost(case) for case in cases]
    missing = set().union(*combinations_of)
    selected: list[int] = []
    while missing:
        best = max(range(len(cases)), key=lambda n: len(combinations_of[n] & missing) / cost_of[n])
        missing -= combinations_of[best]
        selected.append(best)
    everything = set().union(*combinations_of)
    for index in sorted(selected, key=lambda n: -cost_of[n]):
        rest = [n for n in selected if n != index]
        if set().union(*(combinations_of[n] for n in rest)) == everything:
            selected = rest
    return sorted(selected)
