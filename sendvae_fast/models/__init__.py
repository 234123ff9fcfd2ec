"""The networks: autoencoder, discriminator, mapper, SiT and the frozen foundation models."""
