"""Population statistics: what inference is to normalise by, from data."""
