"""One file per model; layers and starting weights that several models share have files of their own."""
