"""Models changed on purpose, one operation a file."""
