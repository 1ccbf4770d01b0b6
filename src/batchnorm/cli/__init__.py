"""The command line: a file for each command, and `main`, which they are run by."""
