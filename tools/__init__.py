"""Commands for maintainers, run as modules from the repository root: `python -m tools.schematics`.

schematics         the diagrams of the networks in `graphics/`
pack_pretrained    the networks in `pretrained/`
"""
