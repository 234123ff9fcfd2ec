"""Looking at every picture once: catalogs, packing, and the sandbox in which strangers' pictures are opened."""
