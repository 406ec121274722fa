"""Routing: the map from a hidden state to experts, what it observes, what it costs, and how tokens are dispatched."""
