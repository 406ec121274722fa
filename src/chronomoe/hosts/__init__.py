"""Models of transformers: which routers can be steered, how steering is put on them, and how routing is captured."""
