"""Parameters: the plan of a shape, and the plans of a tree."""
