"""strop.planner."""
