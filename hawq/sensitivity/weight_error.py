r"""The squared rounding error alone, blind to curvature: the baseline that the Hessian has to beat.

.. math:: \Omega_i(b) = \|Q_b(W_i) - W_i\|_2^2
"""

from hawq.sensitivity.table import Errors, SensitivityTable


def weight_error(errors: Errors) -> SensitivityTable:
    """The table of the rounding errors themselves; they are computed, not sampled, and have no standard error."""
    return SensitivityTable(errors, {name: dict.fromkeys(row, 0.0) for name, row in errors.items()}, "weight-error")
