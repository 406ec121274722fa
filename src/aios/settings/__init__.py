"""Options of commands, class by class. Imports nothing heavy, so that help appears at once."""
