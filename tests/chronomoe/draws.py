"""How often the laws of the control layer are drawn: some ten thousand examples over all files that use this."""

from hypothesis import settings

many = settings(max_examples=500)
