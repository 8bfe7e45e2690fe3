"""How shots come in: files become frames."""
