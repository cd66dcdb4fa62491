# SPDX-License-Identifier: Apache-2.0
"""The one error that this package raises for a mistake a user can mend."""


class AquaError(ValueError):
    """A user's mistake, said in one line with its remedy; the command exits with code 2."""
