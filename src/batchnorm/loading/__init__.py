"""What the command line works on: models, data and weights, by the names that users give them."""
