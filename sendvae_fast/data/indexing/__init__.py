"""Examination of every picture, once: catalogs, packing, and the sandbox in which untrusted pictures are opened."""
