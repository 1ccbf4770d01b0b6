"""Models changed in place, one operation a file."""
