# SPDX-License-Identifier: Apache-2.0
"""Tasks that others measure too: files, rows, prompts, answers, figures."""
