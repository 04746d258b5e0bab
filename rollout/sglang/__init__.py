"""Plug-ins that run inside SGLang's processes. The library itself is `sglang`: imports here are absolute.

platform.py   the entry point: which platform an engine runs on
cpu/          the platform for machines without a GPU
delta.py      weights of which only the changed elements arrive
"""
