"""python -m aios."""

from aios.cli import main

main()
