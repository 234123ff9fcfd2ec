"""The LDM autoencoder: network, its folder on disk, published layouts in and out."""
