"""The sendvae command, one module per verb."""
