"""Goals of a workspace: what is wanted, and which experts serve it."""
