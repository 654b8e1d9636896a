"""The retrieval methods that `python -m benchmarks.quality --compare` puts beside RaBitQ, each at a few budgets."""

COMPARED = (
    *(f"oracle-top-p:top_p={p}" for p in (0.5, 0.8)),
    *(f"streaming-llm:recent={tokens}" for tokens in (128, 512)),
    *(f"h2o:budget={budget}" for budget in (128, 512)),
    *(f"snapkv:budget={budget}" for budget in (128, 512)),
    *(f"pyramidkv:budget={budget}" for budget in (128, 512)),
    *(f"quest:budget={budget}" for budget in (64, 128, 512)),
    *(f"sparq:channels=16,recent=16,budget={budget}" for budget in (64, 128, 512)),
    *(f"double-sparsity:budget={budget}" for budget in (64, 128, 512)),
    *(f"tidal-decode:selection_layers=1/3,budget={budget}" for budget in (64, 128)),
    *(f"twilight:base=quest,budget=512,top_p={p}" for p in (0.5, 0.8, 0.95)),
    "magicpig:bits=8,tables=75",
    *(f"pqcache:recent=16,budget={budget}" for budget in (64, 128, 512)),
    "duo-attention:sink=16,recent=64",
    *(f"kivi:bits={bits}" for bits in (2, 4)),
    *(f"extended-rabitq:bits={bits},top_p=0.8" for bits in (1, 2, 4)),
)
