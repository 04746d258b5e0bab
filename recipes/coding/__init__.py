"""The demo task: small programs, facts spread over files, a window too short for all of them."""

from recipes.coding.task import CodingTask

__all__ = ["CodingTask"]
