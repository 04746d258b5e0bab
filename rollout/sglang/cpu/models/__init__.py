"""Model architectures that an engine on a CPU finds without a full search.

SGLang imports all of its model files (about 200) to find one class. With SGLANG_EXTERNAL_MODEL_PACKAGE it first imports
the modules of that package, and searches no further if they contain the architecture.
"""
