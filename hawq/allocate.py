r"""The exact integer program that gives every layer its width (HAWQ-V3, section 3.4).

.. math:: \min_b \sum_i \Omega_i(b_i) \quad \text{subject to} \quad \sum_i c_{k,i}(b_i) + \sum_{ij} d_{k,ij}(b_i, b_j) \le L_k

for every budget k, with one binary variable for each row of the table (or group of tied rows) and width. Rows are layers,
and activations under the name "activation:NAME"; the costs d of two rows at once are for bit operations.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from hawq.allocation import ACTIVATION, Allocation, BudgetUse
from hawq.integer_program import IntegerProgram

Table = Mapping[str, Mapping[int, float]]
Products = Mapping[tuple[str, str], Mapping[tuple[int, int], float]]
Group = tuple[str, ...]


@dataclass(frozen=True)
class Budget:
    """A limit on a cost that adds up over rows, costs[row][bits], in any unit, and the limit in the same one.

    products: what depends on two rows at once, {(layer row, activation row): {(layer bits, activation bits): cost}}.
    Activations, and rows with products, may be missing from `costs`, where they then cost nothing.
    """

    name: str
    costs: Table
    limit: float
    products: Products = field(default_factory=dict)

    def used(self, bits: Mapping[str, int]) -> float:
        """What the widths {row: bits} cost."""
        alone = sum(self.cost(name, width) for name, width in bits.items())
        return float(alone + sum(pair[bits[one], bits[other]] for (one, other), pair in self.products.items()))

    def cost(self, name: str, bits: int) -> float:
        """What the row costs by itself."""
        return self.costs[name][bits] if name in self.costs else 0.0


def allocate(table: Table, budgets: Sequence[Budget] = (), ties: Iterable[Sequence[str]] = ()) -> Allocation:
    """The widths with the least total of `table[row][bits]` that keep every budget.

    ties: groups of rows that get one width. Solved to proven optimality by branch and bound (HiGHS); `gap` is the
    relative distance between the objective and the proven bound.

    Raises ValueError if the table, the budgets and the ties do not fit each other, and if no widths keep the budgets,
    saying which budget is missed by how much.

    >>> import hawq
    >>> table = {"first": {2: 9.0, 8: 0.0}, "second": {2: 1.0, 8: 0.0}}
    >>> costs = {layer: {bits: bits * 100 for bits in row} for layer, row in table.items()}
    >>> allocation = hawq.allocate(table, [hawq.Budget("bits", costs, limit=1000)])
    >>> allocation.bits, allocation.objective, allocation.gap < 1e-9  # proven optimal
    ({'first': 8, 'second': 2}, 1.0, True)
    """
    for budget in budgets:
        _check(table, budget)
    names = [budget.name for budget in budgets]
    if len(set(names)) < len(names):
        raise ValueError(f"two budgets have the same name: {', '.join(names)}")
    choices = [(group, bits) for group in tied_groups(table, ties) for bits in common_widths(table, group)]
    chosen, gap = _program(table, budgets, choices).solve()
    widths = {name: bits for group, bits in (choices[position] for position in chosen) for name in group}
    ordered = {name: widths[name] for name in table}
    return Allocation(
        ordered,
        objective=float(sum(table[name][width] for name, width in ordered.items())),
        gap=float(gap),
        budgets={budget.name: BudgetUse(float(budget.limit), budget.used(ordered)) for budget in budgets},
    )


def _program(table: Table, budgets: Sequence[Budget], choices: list[tuple[Group, int]]) -> IntegerProgram:
    omega = np.array([sum(table[name][bits] for name in group) for group, bits in choices])
    groups = list(dict.fromkeys(group for group, _ in choices))
    number = {name: index for index, group in enumerate(groups) for name in group}
    alone = [[float(sum(budget.cost(name, bits) for name in group)) for group, bits in choices] for budget in budgets]
    positions: dict[int, list[int]] = {index: [] for index in range(len(groups))}
    for position, (group, _) in enumerate(choices):
        positions[number[group[0]]].append(position)
    joint: dict[tuple[int, int], np.ndarray] = {}  # by positions of two choices: a cost for each budget
    for index, budget in enumerate(budgets):
        for (one, other), costs in budget.products.items():
            for first, second in itertools.product(positions[number[one]], positions[number[other]]):
                cost = costs[choices[first][1], choices[second][1]]
                if number[one] != number[other]:
                    key = (min(first, second), max(first, second))
                    joint.setdefault(key, np.zeros(len(budgets)))[index] += cost
                elif first == second:  # tied rows have the same width
                    alone[index][first] += cost
    return IntegerProgram(
        omega,
        owners=np.array([number[group[0]] for group, _ in choices]),
        pairs=np.array(list(joint), dtype=int).reshape(len(joint), 2),
        names=[budget.name for budget in budgets],
        costs=np.hstack(
            [
                np.array(alone, dtype=float).reshape(len(budgets), len(choices)),
                np.array(list(joint.values()), dtype=float).reshape(len(joint), len(budgets)).T,
            ]
        ),
        limits=np.array([budget.limit for budget in budgets], dtype=float),
    )


def tied_groups(table: Table, ties: Iterable[Sequence[str]]) -> list[Group]:
    """The rows, tied ones together; ties that share a row merge."""
    if not table:
        raise ValueError("the sensitivity table is empty: there is no layer to allocate")
    group_of = {name: {name} for name in table}
    for tie in ties:
        for name in tie:
            if name not in table:
                raise ValueError(f"tie {tuple(tie)} names {name!r}, which is not in the sensitivity table")
            if group_of[name] is not group_of[tie[0]]:
                group_of[tie[0]] |= group_of[name]
                for member in group_of[name]:
                    group_of[member] = group_of[tie[0]]
    unique = {id(group): group for group in group_of.values()}
    order = {name: index for index, name in enumerate(table)}
    return [tuple(sorted(group, key=order.__getitem__)) for group in unique.values()]


def common_widths(table: Table, group: Group) -> list[int]:
    widths = [bits for bits in table[group[0]] if all(bits in table[name] for name in group)]
    if not widths:
        raise ValueError(f"tied layers {', '.join(group)} have no width in common")
    for name in group:
        for bits in widths:
            if not np.isfinite(table[name][bits]):
                raise ValueError(f"the sensitivity of layer {name!r} at {bits} bits is {table[name][bits]}")
    return widths


def _check(table: Table, budget: Budget) -> None:
    if not np.isfinite(budget.limit):
        raise ValueError(f"budget {budget.name!r} has the limit {budget.limit}: give a finite number")
    in_products = {name for pair in budget.products for name in pair}
    for name, widths in table.items():
        if name not in budget.costs and (name in in_products or name.startswith(ACTIVATION)):
            continue
        for bits in widths:
            if bits not in budget.costs.get(name, {}):
                raise ValueError(f"budget {budget.name!r} has no cost for layer {name!r} at {bits} bits")
            if not np.isfinite(budget.costs[name][bits]):
                raise ValueError(f"budget {budget.name!r}: the cost of layer {name!r} at {bits} bits is not finite")
    for (one, other), costs in budget.products.items():
        for name in (one, other):
            if name not in table:
                raise ValueError(f"budget {budget.name!r} has a product of {name!r}, which is not in the sensitivity table")
        for first, second in itertools.product(table[one], table[other]):
            if not np.isfinite(costs.get((first, second), np.nan)):
                where = f"{one!r} at {first} bits with {other!r} at {second}"
                raise ValueError(f"budget {budget.name!r} has no finite cost for {where}")
