"""Long commands, one file each; `cli/` only parses arguments and calls them."""
