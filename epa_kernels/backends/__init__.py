"""The implementations of the ops, a module or a folder each; `dispatch` chooses among them."""
