"""Experts, goals and the links between them: what a workspace knows, in artifacts/aios.db."""
