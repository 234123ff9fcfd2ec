"""SiT and LightningDiT: sizes, network, its folder on disk, published layouts in and out."""
