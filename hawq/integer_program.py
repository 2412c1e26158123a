"""The integer program behind an allocation: one choice for each group of rows, several limits, solved to proven optimality."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, linprog, milp
from scipy.sparse import csr_array

from hawq.native_output import native_output_discarded

_OBJECTIVE_SCALE = 1e5  # of the largest entry, where HiGHS proves to an absolute 1e-6
_ENOUGH = 1e4  # a total this large in those units is proven to 1e-10 of itself
_SPARE = 200  # variables that the first core has beyond those of the relaxation's optimum
_MAX_CUTS = 100


@dataclass(frozen=True)
class IntegerProgram:
    """Minimise omega . x over binary x with one choice for each group, where costs . (x, z) <= limits, z_k = x_i(k) x_j(k).

    z is linear: for two groups, the z of one choice of either add up to that choice's x, which binary x fulfil in one way.
    """

    omega: np.ndarray  # (choices,)
    owners: np.ndarray  # (choices,): the group that each choice is for
    pairs: np.ndarray  # (products, 2): positions of two choices of different groups; all choices of two groups, or none
    names: Sequence[str]  # (budgets,)
    costs: np.ndarray  # (budgets, choices + products)
    limits: np.ndarray  # (budgets,)

    def solve(self) -> tuple[np.ndarray, float]:
        """Positions of the chosen choices and the relative gap to the proven bound; ValueError if nothing keeps the limits.

        A core comes first: the variables that the linear relaxation prices lowest. The total found there excludes all that
        is priced above it or alone exceeds it, and the rest is solved again unless the core held it. HiGHS proves
        optimality to an absolute 1e-6: it is repeated at a finer scale until this is nothing beside the total.
        """
        excess = np.concatenate([self.omega - self._least(self.omega)[self.owners], np.zeros(len(self.pairs))])
        allowed = np.ones(len(excess), dtype=bool)
        spare, free = _SPARE, np.full(len(excess), -np.inf)  # a small program is its own core: nothing to price
        while True:
            scale = _OBJECTIVE_SCALE / (excess[allowed].max() or 1.0)
            price = self._prices(np.where(allowed, excess, 0.0) * scale, allowed) / scale if len(excess) > _SPARE else free
            last = int((price <= price.min()).sum()) + spare
            core = allowed & (price <= np.partition(price, last)[last]) if last < len(price) else allowed
            found = self._solve_scaled(np.where(core, excess, 0.0) * scale, core)
            if found is None and core.all():
                raise ValueError(self.why_infeasible())
            if found is None and (core == allowed).all():
                break  # only the solver's tolerance can lose what it found before: that stands, with its own gap
            if found is None:
                spare *= 8
                continue
            chosen, bound = found
            total = float(excess[chosen].sum())
            gap = max(0.0, total - bound / scale) / max(abs(float(self.omega[chosen].sum())), 1e-300)
            better = allowed & (price <= total) & (excess <= total)
            fine = total * scale >= _ENOUGH or not (excess[core] > total).any()
            if fine and not (better & ~core).any():
                break
            allowed, spare = better, len(excess)
        return chosen, gap

    def _prices(self, objective: np.ndarray, allowed: np.ndarray) -> np.ndarray:
        """What a solution among those allowed costs at least if it uses each variable, less what rounding could change.

        From the multipliers y of the linear relaxation: variables up to 1 make b . y + sum_j min(r_j, 0) with r = c - A^T y
        a bound whatever y is (Neumaier and Shcherbina, 2004), and using variable j adds max(r_j, 0).
        """
        equal, targets = self._structure()
        units = np.abs(self.costs).max(axis=1, initial=0.0) + 1e-300
        costs, limits = self.costs / units[:, None], self._tolerated() / units
        bounds = [(0.0, float(upper)) for upper in allowed]
        relaxed = linprog(objective, costs, limits, equal, targets, bounds)  # type: ignore[call-overload]  # sparse is fine
        if relaxed.x is None:
            return np.full(len(objective), -np.inf)
        lower, free = np.minimum(relaxed.ineqlin.marginals, 0.0), relaxed.eqlin.marginals
        reduced = objective - costs.T @ lower - equal.T @ free
        terms = np.abs(objective) + np.abs(costs.T) @ -lower + abs(equal.T) @ np.abs(free)
        rounding = 1e-14 * (terms[allowed].sum() + np.abs(limits) @ -lower + targets @ np.abs(free))
        bound = limits @ lower + targets @ free + np.minimum(reduced, 0.0)[allowed].sum()
        return bound + np.maximum(reduced, 0.0) - rounding

    def _tolerated(self) -> np.ndarray:
        return self.limits + 1e-12 * np.abs(self.limits)  # costs in fractions do not add up to the last digit

    def _solve_scaled(self, objective: np.ndarray, allowed: np.ndarray) -> tuple[np.ndarray, float] | None:
        """Positions of the choices with the least objective among those allowed, and the proven lower bound."""
        units = np.array([_unit(row) for row in self.costs])
        structure, right = self._structure()
        constraints = [LinearConstraint(structure, right, right)]
        if len(self.limits):
            constraints.append(LinearConstraint(csr_array(self.costs / units[:, None]), -np.inf, self._tolerated() / units))
        for _ in range(_MAX_CUTS):
            result = self._milp(objective, constraints, allowed.astype(float))
            if result.x is None:
                return None
            chosen = self._chosen(result)
            if (self._spent(chosen) <= self._tolerated()).all():
                return chosen, float(result.mip_dual_bound)
            # Within the solver's tolerance, but over a limit in exact arithmetic: exclude this very assignment.
            cut = np.zeros((1, self.costs.shape[1]))
            cut[0, chosen] = 1.0
            constraints.append(LinearConstraint(csr_array(cut), -np.inf, len(chosen) - 1))
        raise ValueError("the budgets are so close to the edge of what is possible that the solver's precision fails")

    def why_infeasible(self) -> str:
        """Which budget cannot be kept, and by how much it is missed."""
        for name, costs, limit in zip(self.names, self.costs, self.limits, strict=True):
            least = self._cheapest(costs)
            if least > limit:
                share = f" ({least / limit - 1:.1%})" if limit > 0 else ""
                return (
                    f"budget {name!r} allows {limit:,.10g}, but the narrowest widths offered already need "
                    f"{least:,.10g}, {least - limit:,.10g}{share} more: raise the limit or offer narrower widths"
                )
        # Each can be kept alone: find the smallest relative excess with which all can be kept together.
        sizes = np.maximum(np.abs(self.limits), 1e-300)
        within = np.hstack([self.costs / sizes[:, None], -np.ones((len(sizes), 1))])
        structure, right = self._structure(spare_columns=1)
        constraints = [LinearConstraint(structure, right, right), LinearConstraint(within, -np.inf, self.limits / sizes)]
        columns = within.shape[1]
        excess = self._milp(np.eye(columns)[-1], constraints, np.array([1.0] * (columns - 1) + [np.inf])).fun
        if excess < 1e-6:
            return "the budgets can be kept, but only so closely that the solver's precision fails: loosen one by a millionth"
        names = " and ".join(f"{name!r} ({limit:,.10g})" for name, limit in zip(self.names, self.limits, strict=True))
        return f"budgets {names} can each be kept, but not together: the nearest widths exceed one of them by {excess:.2%}"

    def _cheapest(self, costs: np.ndarray) -> float:
        """The least that these costs can come to."""
        alone, joint = np.split(costs, [len(self.omega)])
        if not joint.any():
            return float(self._least(alone).sum())
        structure, right = self._structure()
        result = self._milp(costs / _unit(costs), [LinearConstraint(structure, right, right)], np.ones(len(costs)))
        return float(costs[self._columns(self._chosen(result))].sum())

    def _least(self, values: np.ndarray) -> np.ndarray:
        """The least value of each group."""
        least = np.full(self.owners.max() + 1, np.inf)
        np.minimum.at(least, self.owners, values)
        return least

    def _chosen(self, result: OptimizeResult) -> np.ndarray:
        return np.flatnonzero(result.x[: len(self.omega)] > 0.5)

    def _columns(self, chosen: np.ndarray) -> np.ndarray:
        """Positions of the variables that are 1: the chosen choices, and products of which both factors are chosen."""
        products = np.flatnonzero(np.isin(self.pairs, chosen).all(axis=1))
        return np.concatenate([chosen, len(self.omega) + products])

    def _spent(self, chosen: np.ndarray) -> np.ndarray:
        columns = self._columns(chosen)
        return np.array([row[columns].sum() for row in self.costs])

    def _structure(self, spare_columns: int = 0) -> tuple[csr_array, np.ndarray]:
        """Matrix and right side of: one choice for each group, and the products' marginals.

        `spare_columns` further variables do not take part.
        """
        count, products = len(self.omega), len(self.pairs)
        # A row for each side of the products, choice on it and group on the other side.
        sides = [
            np.stack([np.full(products, side), self.pairs[:, side], self.owners[self.pairs[:, 1 - side]]]) for side in (0, 1)
        ]
        rows, row_of = np.unique(np.hstack(sides), axis=1, return_inverse=True)
        marginals, groups = rows.shape[1], int(self.owners.max()) + 1
        entries = [
            (np.ones(count), self.owners, np.arange(count)),
            (-np.ones(marginals), groups + np.arange(marginals), rows[1]),
            (np.ones(2 * products), groups + row_of.ravel(), count + np.tile(np.arange(products), 2)),
        ]
        values, down, across = (np.concatenate(part) for part in zip(*entries, strict=True))
        shape = (groups + marginals, count + products + spare_columns)
        return csr_array((values, (down, across)), shape=shape), np.repeat([1.0, 0.0], [groups, marginals])

    def _milp(self, objective: np.ndarray, constraints: list[LinearConstraint], upper: np.ndarray) -> OptimizeResult:
        """HiGHS with a gap of zero, variables from 0 to `upper`; choices are whole, products and spare columns real."""
        with native_output_discarded():
            return milp(
                objective,
                constraints=constraints,
                integrality=(np.arange(len(objective)) < len(self.omega)).astype(int),
                bounds=Bounds(np.zeros(len(objective)), upper),
                options={"mip_rel_gap": 0.0},
            )


def _unit(costs: np.ndarray) -> float:
    """What to count a budget in: the largest unit that leaves whole numbers whole, else the largest cost."""
    whole = np.round(costs)
    if np.array_equal(whole, costs) and np.abs(whole).max() < 2**53:
        return float(np.gcd.reduce(whole.astype(np.int64))) or 1.0
    return float(np.abs(costs).max()) or 1.0
