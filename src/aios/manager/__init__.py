"""Subbrains Manager: the web page over the same functions the commands use (`aios manager`, docs/manager.md)."""
