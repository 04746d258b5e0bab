"""Recovery of a run whose processes die while it trains."""
