"""Commands for maintainers: the drawings of the networks, and packing of the weights in `pretrained/`."""
