# SPDX-License-Identifier: Apache-2.0
"""From a model and a text to its projections: sums over tokens, their file, the state of a killed run."""

from typing import TYPE_CHECKING

from aqua_attention import lazy

if TYPE_CHECKING:
    from aqua_attention.calibration.run import calibrate as calibrate
    from aqua_attention.calibration.run import calibrate_inputs as calibrate_inputs

__getattr__ = lazy(__name__, {"calibrate": "run", "calibrate_inputs": "run"})
