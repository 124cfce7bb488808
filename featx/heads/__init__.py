"""One file per head, whose name is what users type; `featx.learning` finds and fits them."""
