"""How pairs are judged: one home for what validation and the report share, so that both measure the same."""
