"""Experts as first-class objects: trained alone, attached behind a gate, detached without a trace."""
