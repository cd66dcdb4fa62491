# SPDX-License-Identifier: Apache-2.0
"""The command `aqua`: parsing and printing only. Libraries load inside the commands, so that --help is quick."""
