"""Training: the autoencoder, then text encoder and U-Net by forward diffusion."""
