"""The averagers, one file each, opening with its formula and its paper."""
