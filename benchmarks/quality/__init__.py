"""Quality of long-context answers: retrieval tasks, published evaluation sets, and the small model trained on them."""
