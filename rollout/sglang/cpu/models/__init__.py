"""Architectures that an engine on a CPU knows at once.

SGLang imports every model file it has (about 200) to find one class. Given a package (SGLANG_EXTERNAL_MODEL_PACKAGE) it
imports that one's modules and looks no further when the wanted architecture is among them.
"""
