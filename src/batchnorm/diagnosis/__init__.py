"""What is wrong with a network's batch norm: the checks, what they look at, and the report."""
