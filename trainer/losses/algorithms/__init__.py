"""One policy loss a file. Importing the package imports each of them, and each registers itself.

A new loss is a new file here, with its equation, gradient and range in the docstring, that ends in `register(...)`.
"""

from importlib import import_module
from pkgutil import iter_modules


def load() -> None:
    """Import every file of the package that is not imported yet."""
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")


load()
