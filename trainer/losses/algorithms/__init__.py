"""Policy losses, one per file. Importing the package imports each file, and each registers its loss.

To add a loss, add a file here with the equation, gradient and range in its docstring that ends in `register(...)`.
"""

from importlib import import_module
from pkgutil import iter_modules


def load() -> None:
    """Import every file of the package that has not been imported yet."""
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")


load()
