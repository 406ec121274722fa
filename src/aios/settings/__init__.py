"""What commands can be told, class by class. Imports nothing heavy: the command line shows it at once."""
