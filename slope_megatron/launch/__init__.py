"""From a cluster's facts to started ranks: rank resolver, layouts, planner, preflight."""
