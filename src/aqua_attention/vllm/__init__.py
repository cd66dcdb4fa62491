# SPDX-License-Identifier: Apache-2.0
"""AQUA as an attention backend of vLLM: a plugin that vLLM loads by itself, see `plugin`.

Nothing here is imported by the rest of the package, and vLLM is imported by nothing else.
"""
