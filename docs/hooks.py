"""What mkdocs runs: a ```math block becomes MathML, which browsers draw without a script (GitHub draws it too)."""

from typing import Any

from latex2mathml.converter import convert


def on_config(config: Any) -> Any:
    """Add the fence to those of pymdownx.superfences."""
    fence = {"name": "math", "class": "math", "format": math}
    config["mdx_configs"].setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    return config


def math(source: str, *_: Any, **__: Any) -> str:
    """One equation in LaTeX, displayed."""
    return f'<div class="math">{convert(source.strip(), display="block")}</div>'
