"""Brains: trained models as bundles on disk, and what can be done with one."""
