"""The checks: a file for each group, one function for each check."""
