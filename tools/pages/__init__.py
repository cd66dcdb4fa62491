# SPDX-License-Identifier: Apache-2.0
"""What README and docs/ are held to, and how the site is made of them. For development; not part of the package."""
