"""`sendvae play`: trained networks in a browser. `page.py` is the page; what it shows is computed outside it."""
