"""Draw pictures from a stage 2 run: python examples/sample_from_run.py GENERATOR AUTOENCODER OUT.png"""

import sys

from sendvae_fast import load_autoencoder, load_generator
from sendvae_fast.image_grid import save_grid

generator, autoencoder = load_generator(sys.argv[1]), load_autoencoder(sys.argv[2])
drawn = generator.sample(autoencoder, num_samples=16, guidance_scale=2.5, seed=0)
save_grid(sys.argv[3], drawn.images, columns=4)
