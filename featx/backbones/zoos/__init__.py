"""One file per place that networks come from, with one function `load`; its name is the prefix that users type."""
