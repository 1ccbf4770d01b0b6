"""The operations: `reference` says what they mean, the other rooms make them fast."""
