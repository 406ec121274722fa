"""Experts: trained apart, kept in a registry, attached to brains."""
