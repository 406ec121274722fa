"""What mkdocs runs: a ```math block becomes MathML, which browsers draw without a script (GitHub draws it too)."""

from typing import Any

from latex2mathml.converter import convert


def on_config(config: Any) -> Any:
    """Add the fence to those of pymdownx.superfences."""
    fence = {"name": "math", "class": "math", "format": math}
    config["mdx_configs"].setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    return config


def math(source: str, *_: Any, **__: Any) -> str:
    """One or more lines of LaTeX, each a displayed equation; a blank line separates them."""
    return "\n".join(convert(line, display="block") for line in source.split("\n\n") if line.strip())
