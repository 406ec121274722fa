"""aios: the application around chronomoe. Brains, data, command line."""
