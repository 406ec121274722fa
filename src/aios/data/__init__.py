"""Text in, prepared tokens out: sources, the held-out split, tokenizers, sample corpora."""
