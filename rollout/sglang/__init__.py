"""Plug-ins that run inside SGLang's processes, and SGLang's command-line options.

`sglang` is also the name of the library: imports in this folder are absolute.

platform.py   the entry point, which selects the platform of an engine
cpu/          the platform for machines without a GPU
delta.py      weight updates that contain only the changed elements
options.py    `rollout.engine.options`
"""
