"""The demo task: write small programs from facts in several files, with a window too short for all of them."""

from recipes.coding.task import CodingTask

__all__ = ["CodingTask"]
