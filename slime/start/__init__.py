"""Set-up: from a checked configuration to the inputs, the folder and the placement of a run."""
