r"""HAWQ-V2: the average Hessian trace times the squared rounding error (Dong et al. 2020, equation 10).

.. math:: \Omega_i(b) = \frac{\mathrm{Tr}(H_i)}{n_i} \, \|Q_b(W_i) - W_i\|_2^2

Half of the sum over layers is the expected increase of the loss, if rounding errors point in no particular direction.
"""

from collections.abc import Mapping

from hawq.graph import Layer
from hawq.sensitivity.table import Errors, SensitivityTable
from hessian.results import LayerReport


def hessian_trace(layers: Mapping[str, Layer], errors: Errors, traces: LayerReport) -> SensitivityTable:
    """The table from the layers' squared rounding errors and the traces of their weights.

    A sampled trace that came out below its standard error counts as that: noise must not make a layer seem free.
    """
    omega, stderr = {}, {}
    for name, layer in layers.items():
        row = traces[layer.weight]
        mean = max(row.trace, row.trace_stderr) / row.num_params
        omega[name] = {bits: mean * error for bits, error in errors[name].items()}
        stderr[name] = {bits: row.trace_stderr / row.num_params * error for bits, error in errors[name].items()}
    return SensitivityTable(omega, stderr, "hessian-trace", predicts=0.5)
