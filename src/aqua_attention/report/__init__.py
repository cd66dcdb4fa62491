# SPDX-License-Identifier: Apache-2.0
"""A results directory as one page: what was measured, in tables and figures, in HTML and in Markdown."""
