"""Rows of the methods that work on singular vectors; see `battery.py`.

Whole leaves are decomposed, so bits differ from place to place.
"""

import patchjax as pj
from tests.merging.battery_case import Case

# Of methods that treat singular vectors apart. They are as sure as their
# values are apart, and LAPACK's single precision rounds otherwise on other
# processors: 2.2e-6 is the most seen. Methods of all of them together are sure.
APART = 5e-6

CASES: dict[str, Case] = {
  "tsv_m": Case(
    {"scale": 0.8},
    swept={"scale": 0.5},
    exact=False,
    alone={"scale": 1.0},
    close=APART,
  ),
  "tsv_m/share": Case(
    {"share": 0.2, "layout": "out_in"}, exact=False, close=APART
  ),
  "star": Case(
    {"eta": 45.0, "scale": 0.9},
    swept={"eta": 70.0, "scale": 1.0},
    exact=False,
    alone={"eta": 100.0, "scale": 1.0},
    agreed={"eta": 100.0, "scale": 1.0},
    close=APART,
  ),
  "star/each": Case({"eta": [30.0, 60.0, 90.0]}, exact=False, close=APART),
  "iso_c": Case({"scale": 0.8}, swept={"scale": 1.2}, exact=False),
  "iso_cts": Case(
    {"scale": 0.8}, swept={"scale": 1.2}, exact=False, close=APART
  ),
  "iso_cts/inputs": Case(
    {"common": 0.5, "layout": "out_in"}, exact=False, close=APART
  ),
  "wudi": Case(
    {"scale": 0.9},
    swept={"scale": 0.7, "ridge": 0.1},
    exact=False,
    alone={"scale": 1.0},
    agreed={"scale": 1.0},
  ),
  "wudi/ridge": Case({"ridge": 0.3, "layout": "out_in"}, exact=False),
  "wudi/adam": Case(
    {"solver": "adam", "iterations": 20, "learning_rate": 1e-3},
    swept={"learning_rate": 1e-4},
    exact=False,
  ),
  "knots": Case(
    swept={"threshold": 2.0},
    exact=False,
    local=False,
    contributors=2,
    alone={"method": pj.merging.task_arithmetic()},
    close=APART,
    heavy=True,
  ),
  "svc": Case(
    {"alpha": 0.3},
    swept={"alpha": 0.6},
    exact=False,
    alone={},
    agreed={},
  ),
  "svc/paper": Case({"alpha": 0.3, "formula": "paper"}, exact=False),
}
