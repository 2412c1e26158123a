r"""The exact integer program that gives every layer its width (HAWQ-V3, section 3.4).

.. math:: \min_b \sum_i \Omega_i(b_i) \quad \text{subject to} \quad \sum_i c_{k,i}(b_i) \le L_k \;\; \text{for every budget } k

with one binary variable for each layer (or group of tied layers) and width.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import csr_array

from hawq.allocation import Allocation, BudgetUse

Table = Mapping[str, Mapping[int, float]]

_OBJECTIVE_SCALE = 1e5  # of the largest entry, where HiGHS proves to an absolute 1e-6
_MAX_CUTS = 100


@dataclass(frozen=True)
class Budget:
    """A limit on a cost that adds up over layers: costs[layer][bits], in any unit, and the limit in the same one."""

    name: str
    costs: Table
    limit: float


def allocate(table: Table, budgets: Sequence[Budget] = (), ties: Iterable[Sequence[str]] = ()) -> Allocation:
    """The widths with the least total of `table[layer][bits]` that keep every budget.

    ties: groups of layers that get one width. Solved to proven optimality by branch and bound (HiGHS); `gap` is the
    relative distance between the objective and the proven bound.

    Raises ValueError if the table, the budgets and the ties do not fit each other, and if no widths keep the budgets,
    saying which budget is missed by how much.
    """
    _check_budgets(table, budgets)
    program = _Program.build(table, budgets, _groups(table, ties))
    chosen, gap = program.solve()
    widths = {name: bits for group, bits in chosen for name in group}
    ordered = {name: widths[name] for name in table}
    used = {budget.name: sum(budget.costs[name][width] for name, width in ordered.items()) for budget in budgets}
    return Allocation(
        ordered,
        objective=float(sum(table[name][width] for name, width in ordered.items())),
        gap=gap,
        budgets={budget.name: BudgetUse(float(budget.limit), float(used[budget.name])) for budget in budgets},
    )


def _groups(table: Table, ties: Iterable[Sequence[str]]) -> list[tuple[str, ...]]:
    """The layers, tied ones together; ties that share a layer merge."""
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
    return [tuple(name for name in table if name in group) for group in unique.values()]


def _common_widths(table: Table, group: tuple[str, ...]) -> list[int]:
    widths = [bits for bits in table[group[0]] if all(bits in table[name] for name in group)]
    if not widths:
        raise ValueError(f"tied layers {', '.join(group)} have no width in common")
    for name in group:
        for bits in widths:
            if not np.isfinite(table[name][bits]):
                raise ValueError(f"the sensitivity of layer {name!r} at {bits} bits is {table[name][bits]}")
    return widths


def _check_budgets(table: Table, budgets: Sequence[Budget]) -> None:
    names = [budget.name for budget in budgets]
    if len(set(names)) < len(names):
        raise ValueError(f"two budgets have the same name: {', '.join(names)}")
    for budget in budgets:
        if not np.isfinite(budget.limit):
            raise ValueError(f"budget {budget.name!r} has the limit {budget.limit}: give a finite number")
        for name, widths in table.items():
            for bits in widths:
                if not np.isfinite(budget.costs.get(name, {}).get(bits, 0.0)):
                    raise ValueError(f"budget {budget.name!r}: the cost of layer {name!r} at {bits} bits is not finite")
            missing = [bits for bits in widths if bits not in budget.costs.get(name, {})]
            if missing:
                raise ValueError(f"budget {budget.name!r} has no cost for layer {name!r} at {missing[0]} bits")


@dataclass(frozen=True)
class _Program:
    """Minimise omega . x, x binary, one choice (group of layers, bits) for each group, costs . x <= limits."""

    choices: list[tuple[tuple[str, ...], int]]
    budgets: Sequence[Budget]
    omega: np.ndarray  # (choices,)
    costs: np.ndarray  # (budgets, choices)
    owners: np.ndarray  # (choices,): the group that each choice is for

    @classmethod
    def build(cls, table: Table, budgets: Sequence[Budget], groups: list[tuple[str, ...]]) -> "_Program":
        choices = [(group, bits) for group in groups for bits in _common_widths(table, group)]
        omega = np.array([sum(table[name][bits] for name in group) for group, bits in choices])
        costs = [[sum(budget.costs[name][bits] for name in group) for group, bits in choices] for budget in budgets]
        number = {group: index for index, group in enumerate(groups)}
        owners = np.array([number[group] for group, _ in choices])
        return cls(choices, budgets, omega, np.array(costs).reshape(len(budgets), len(choices)), owners)

    def one_width_each(self, spare_columns: int = 0) -> LinearConstraint:
        """Every group gets exactly one of its choices; `spare_columns` further variables do not take part."""
        count = len(self.choices)
        shape = (int(self.owners.max()) + 1, count + spare_columns)
        return LinearConstraint(csr_array((np.ones(count), (self.owners, np.arange(count))), shape=shape), 1, 1)

    def solve(self) -> tuple[list[tuple[tuple[str, ...], int]], float]:
        """The chosen (group, bits) and the relative gap to the proven bound.

        HiGHS proves optimality to an absolute 1e-6. So that this is nothing beside the total, whatever the range of the
        table, choices that alone exceed the best total found are excluded and the rest is scaled and solved again.
        """
        least = np.full(self.owners.max() + 1, np.inf)
        np.minimum.at(least, self.owners, self.omega)
        excess = self.omega - least[self.owners]
        allowed = np.ones(len(excess), dtype=bool)
        while True:
            scale = _OBJECTIVE_SCALE / (excess[allowed].max() or 1.0)
            chosen, bound = self._solve_scaled(np.where(allowed, excess, 0.0) * scale, allowed)
            total = excess[chosen].sum()
            hopeless = allowed & (excess > total)
            if not hopeless.any():
                break
            allowed &= ~hopeless
        objective = float(self.omega[chosen].sum())
        gap = max(0.0, float(total) - bound / scale) / max(abs(objective), 1e-300)
        return [self.choices[position] for position in chosen], gap

    def _solve_scaled(self, objective: np.ndarray, allowed: np.ndarray) -> tuple[np.ndarray, float]:
        """Positions of the choices with the least objective among those allowed, and the proven lower bound."""
        limits = np.array([budget.limit for budget in self.budgets], dtype=float)
        tolerated = limits + 1e-12 * np.abs(limits)  # costs in fractions do not add up to the last digit
        units = np.array([_unit(row) for row in self.costs])
        constraints = [self.one_width_each()]
        if len(self.budgets):
            constraints.append(LinearConstraint(csr_array(self.costs / units[:, None]), -np.inf, tolerated / units))
        for _ in range(_MAX_CUTS):
            result = _milp(objective, constraints, allowed.astype(float))
            if result.x is None:
                raise ValueError(self.why_infeasible())
            chosen = np.flatnonzero(result.x > 0.5)
            if all(self.costs[index, chosen].sum() <= limit for index, limit in enumerate(tolerated)):
                return chosen, float(result.mip_dual_bound)
            # Within the solver's tolerance, but over a limit in exact arithmetic: exclude this very assignment.
            cut = np.zeros((1, len(self.choices)))
            cut[0, chosen] = 1.0
            constraints.append(LinearConstraint(csr_array(cut), -np.inf, len(chosen) - 1))
        raise ValueError("the budgets are so close to the edge of what is possible that the solver's precision fails")

    def why_infeasible(self) -> str:
        """Which budget cannot be kept, and by how much it is missed."""
        for budget, costs in zip(self.budgets, self.costs, strict=True):
            cheapest = np.full(self.owners.max() + 1, np.inf)
            np.minimum.at(cheapest, self.owners, costs)
            least = float(cheapest.sum())
            if least > budget.limit:
                share = f" ({least / budget.limit - 1:.1%})" if budget.limit > 0 else ""
                return (
                    f"budget {budget.name!r} allows {budget.limit:,.10g}, but the narrowest widths offered already need "
                    f"{least:,.10g}, {least - budget.limit:,.10g}{share} more: raise the limit or offer narrower widths"
                )
        # Each can be kept alone: find the smallest relative excess with which all can be kept together.
        limits = np.array([budget.limit for budget in self.budgets])
        sizes = np.maximum(np.abs(limits), 1e-300)
        within = LinearConstraint(np.hstack([self.costs / sizes[:, None], -np.ones((len(limits), 1))]), -np.inf, limits / sizes)
        objective = np.zeros(len(self.choices) + 1)
        objective[-1] = 1.0
        upper = np.ones(len(objective))
        upper[-1] = np.inf
        constraints = [self.one_width_each(spare_columns=1), within]
        excess = float(_milp(objective, constraints, upper, continuous=1).fun)
        if excess < 1e-6:
            return "the budgets can be kept, but only so closely that the solver's precision fails: loosen one by a millionth"
        names = " and ".join(f"{budget.name!r} ({budget.limit:,.10g})" for budget in self.budgets)
        return f"budgets {names} can each be kept, but not together: the nearest widths exceed one of them by {excess:.2%}"


def _unit(costs: np.ndarray) -> float:
    """What to count a budget in: the largest unit that leaves whole numbers whole, else the largest cost."""
    whole = np.round(costs)
    if np.array_equal(whole, costs) and np.abs(whole).max() < 2**53:
        return float(np.gcd.reduce(whole.astype(np.int64))) or 1.0
    return float(np.abs(costs).max()) or 1.0


def _milp(objective: np.ndarray, constraints: list[LinearConstraint], upper: np.ndarray, continuous: int = 0) -> OptimizeResult:
    """HiGHS with a gap of zero, variables from 0 to `upper`; the last `continuous` are real, the others whole."""
    integrality = np.ones(len(objective), dtype=int)
    if continuous:
        integrality[-continuous:] = 0
    return milp(
        objective,
        constraints=constraints,
        integrality=integrality,
        bounds=Bounds(np.zeros(len(objective)), upper),
        options={"mip_rel_gap": 0.0},
    )
