"""Parameters: the layout of a shape, and the plan of a tree."""
