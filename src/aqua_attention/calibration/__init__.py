# SPDX-License-Identifier: Apache-2.0
"""From a model and a text to its projections: sums over tokens, their file, the state of a killed run."""
