"""Tables for people."""


def print_table(columns: list[str], rows: list[list[str]]) -> None:
    """Print rows under their columns."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(Text, row))  # not markup: a name may have brackets
    Console(highlight=False).print(table)
