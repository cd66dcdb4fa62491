# SPDX-License-Identifier: Apache-2.0
"""The tasks of RULER (arXiv 2404.06654): how an item of each is made. The suite is `suites/ruler.py`."""
