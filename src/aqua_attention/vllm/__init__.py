# SPDX-License-Identifier: Apache-2.0
"""AQUA as an attention backend of vLLM: a plugin that vLLM loads by itself, see `plugin`.

The rest of the package imports nothing of it but its settings and its name, for `aqua bench serve`.
"""
