"""Callbacks for training libraries. Each file imports its library; nothing else here does."""
