"""One file per model; files whose layers several models share stand beside them."""
