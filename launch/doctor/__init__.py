"""Checks of the machines that a run would use: `quick` before every run, `full` for `slime doctor`.

Each check is a function that returns findings; a finding is one line with what was found and, where it is not as it
should be, the cure.
"""
